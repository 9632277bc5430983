"""Figures while training: the same as evaluate_fid.py's, stopped and resumed."""

import errno
import json
import os
import signal

import pytest
from conftest import ROOT
from evaluation_stub import COUNT, Stub, make_sets

from iwin_dit.build import evaluation
from iwin_dit.config.parse import load_config
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.runtime.errors import ConfigError, DiskError
from iwin_dit.training import loop


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def watched(sets, recipe, tmp_path, monkeypatch):
    """A recipe of eight steps that is evaluated at the fourth and at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Stub)
    return recipe(
        train={"max_steps": 8, "save_every_steps": 4, "evaluate_every_steps": 4},
        evaluation={
            "reference": str(sets / "real"),
            "num_images": COUNT,
            "batch_images": 5,
            "metrics": ["fid", "kid"],
        },
        sample={"num_inference_steps": 2, "guidance_scale": 2.0},
    )


def figures(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if "evaluated" in record}


def test_figures_are_those_of_evaluate_fid(watched, sets, train_here, script_here, tmp_path):
    """And what somebody else keeps in the run's folder stays."""
    mine = tmp_path / "run" / "evaluation" / "fid_of_my_paper.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    code, output = train_here("--config", watched)
    assert code == 0, output
    found = figures(tmp_path / "run")
    assert list(found) == [4, 8]
    assert found[4]["fid"] != found[8]["fid"]
    assert not (tmp_path / "run" / ".evaluation").exists()
    assert mine.read_text() == "{}"
    drawn = ("--num-images", COUNT, "--steps", 2, "--guidance-scale", 2.0, "--draw-batch", 5)
    code, output = script_here(
        *("evaluate_fid.py", "--generated", tmp_path / "run", "--reference", sets / "real", *drawn),
        *("--metrics", "fid,kid", "--out", tmp_path / "result.json"),
    )
    assert code == 0, output
    first = json.loads((tmp_path / "result.json").read_text())
    expected = first["figures"]
    assert {name: found[8][name] for name in expected} == pytest.approx(expected, rel=1e-6)

    other = ("--generated", tmp_path / "run", "--reference", sets / "real", "--num-images", 2, "--steps", 1)
    for decay in ("none", "0.9"):
        options = (*other, "--ema", decay, "--out", tmp_path / "result.json")
        code, output = script_here("evaluate_fid.py", *options)
        assert code == 0, output
        again = json.loads((tmp_path / "result.json").read_text())["generated"]
        assert again["ema"] == decay
        same = again["weights_sha256"] == first["generated"]["weights_sha256"]
        assert same == (decay == "0.9"), "another average of the run, or the first"

    code, output = train_here("--config", watched)
    assert code == 0, output
    assert figures(tmp_path / "run") == found, "a finished run is not evaluated again"


def test_an_evaluation_that_was_stopped_is_made_by_the_resumed_run(
    watched, train_here, tmp_path, monkeypatch
):
    code, output = train_here("--config", watched)
    assert code == 0, output
    expected = figures(tmp_path / "run")

    draw, calls = evaluation.drawer, []

    def stopping(*arguments):
        drawing = draw(*arguments)

        def stop_at_the_second(*batch):
            calls.append(batch)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return drawing(*batch)

        return stop_at_the_second

    monkeypatch.setattr(evaluation, "drawer", stopping)
    code, output = train_here("--config", watched, "--output_dir", tmp_path / "other")
    assert code == 143, output
    assert figures(tmp_path / "other") == {}
    assert "stopped at step 4 with a checkpoint" in output
    monkeypatch.setattr(evaluation, "drawer", draw)
    code, output = train_here("--config", watched, "--output_dir", tmp_path / "other")
    assert code == 0, output
    assert figures(tmp_path / "other") == expected


def test_what_a_spike_takes_back_is_evaluated_again(watched, train_here, tmp_path, monkeypatch):
    """The loss is a hundred times as large in step 13: back to step 8; step 12 is evaluated a second time."""
    real, calls = FlowMatching.loss, []

    def loss(*arguments):
        calls.append(0)
        return real(*arguments) * (100 if len(calls) == 13 else 1)

    monkeypatch.setattr(FlowMatching, "loss", loss)
    longer = ("--train.max_steps", 16, "--train.save_every_steps", 8, "--train.log_every_steps", 1)
    code, output = train_here("--config", watched, *longer, "--train.spike_factor", 5)
    assert code == 0, output
    assert "loss spike at step 13: back to step 8" in output
    assert list(figures(tmp_path / "run")) == [4, 8, 12, 16]


def test_what_is_wrong_shows_before_training(watched, train_here, tmp_path):
    for arguments, message in (
        (("--evaluation.reference", "nowhere"), "nowhere is neither a folder"),
        (("--evaluation.metrics", "[fd]"), "fd is not of evaluation.extractor inception"),
        (("--evaluation.extractor", "iwin:none", "--evaluation.metrics", "[fd]"), "none is no run"),
        (("--evaluation.num_images", "1"), "needs 2 images or more on each side, found 1 and 12"),
    ):
        code, output = train_here("--config", watched, *arguments)
        assert code == 2
        assert message in output
        assert "Traceback" not in output
        assert not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
    path = tmp_path / "none.yaml"
    path.write_text((ROOT / "configs" / "quickstart.yaml").read_text() + "evaluation: {num_images: 10}\n")
    text = path.read_text().replace(
        "save_every_steps: 300", "save_every_steps: 300\n  evaluate_every_steps: 300"
    )
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"evaluation\.reference is not set"):
        load_config(path)


def test_figures_that_cannot_be_written_come_after_a_checkpoint(watched, train_here, tmp_path, monkeypatch):
    write = loop.write_log

    def full(run, record):
        if "evaluated" in record and record["step"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(run, record)

    monkeypatch.setattr(loop, "write_log", full)
    code, output = train_here("--config", watched, "--train.save_every_steps", 100)
    assert code == DiskError.exit_code, output
    assert "error: the log cannot be written: No space left on device; make room" in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
