"""``iwin-dit extrapolate``: samples, a copy that learns from them, and the way past the model."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from evaluation_stub import COUNT, Stub, make_sets
from safetensors.torch import load_file

from iwin_dit import commands
from iwin_dit.build.extrapolation import extrapolate
from iwin_dit.build.loading import load_pipeline
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.runtime.errors import CheckpointError, run_script
from iwin_dit.runtime.seeds import generator

WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def run(recipe, train_here, tmp_path, monkeypatch):
    """A run of four steps with a head inside, whose schedule and average the copy does not take over."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("iwin_dit.evaluation.extractors.Inception", Stub)
    config = recipe(
        train={"max_steps": 4, "trackers": ["tensorboard"]},
        model={"base_block": 1},
        optimizer={"schedule": "linear"},
        sample={"guidance_scale": 1.5, "internal_guidance": 1.2},
    )
    code, output = train_here("--config", config)
    assert code == 0, output
    return tmp_path / "run"


@pytest.fixture
def extrapolate_here(run, sets, capfd, monkeypatch):
    def call(*arguments, expect=0):
        given = ("--reference", sets / "real", "--num-images", COUNT, "--num-samples", 11, *arguments)
        monkeypatch.setattr(sys, "argv", ["iwin-dit", "extrapolate", *map(str, (run, *given))])
        with pytest.raises(SystemExit) as end:
            run_script(commands.run)
        output = "".join(capfd.readouterr())
        assert end.value.code == expect, output
        return output

    return call


def weights_of(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_model_moves_away_from_what_its_samples_teach(run, extrapolate_here, tmp_path):
    out = tmp_path / "run-extrapolated"
    output = extrapolate_here("--training-steps", 3, "--scales", 1, -0.5, "--batch-size", 4)
    model, copy = load_file(run / WEIGHTS), load_file(out / "copy" / WEIGHTS)
    assert any(not torch.equal(model[name], copy[name]) for name in model)
    assert all(torch.equal(tensor, model[name]) for name, tensor in weights_of(out / "scale-0").items())
    for scale in (1, -0.5):
        found = weights_of(out / f"scale-{scale:g}")
        for name, theta in model.items():
            torch.testing.assert_close(found[name], (1 + scale) * theta - scale * copy[name])

    figures = {
        w: json.loads((out / f"scale-{w}.json").read_text())["figures"]["fid"] for w in ("-0.5", "0", "1")
    }
    best = min(figures, key=figures.get)
    assert f"best is scale {best}; try: python sample.py --checkpoint {out}/scale-{best}" in output
    assert output.count("| scale ") == 3

    # what the copy has learnt from are the model's own samples, drawn as its recipe says
    samples = load_file(out / "samples" / "latents-00000000.safetensors")["latents"]
    pipeline = load_pipeline(str(run))
    options = dict(num_inference_steps=2, guidance_scale=1.5, internal_guidance=1.2, output_type="latent")
    seeds = [generator(0, "own sample", number) for number in range(4, 8)]
    expected = pipeline([number % 3 for number in range(4, 8)], generator=seeds, **options).images
    torch.testing.assert_close(samples[4:8], expected)
    assert len(samples) == 11
    trained = json.loads((out / "copy" / "pipeline" / "recipe.json").read_text())["config"]
    assert (trained["optimizer"]["schedule"], trained["train"]["trackers"]) == ("constant", [])

    written = {path: path.stat().st_mtime_ns for path in out.glob("scale-*")}
    output = extrapolate_here("--training-steps", 3, "--scales", 1, 2, "--batch-size", 8)
    assert output.count("| scale ") == 3
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what is there stays"
    assert (out / "scale-2").is_dir()


def test_what_was_interrupted_goes_on_to_the_same_bits(run, extrapolate_here, tmp_path):
    options = ("--training-steps", 2, "--scales", 1)
    extrapolate_here(*options)
    out, whole = tmp_path / "run-extrapolated", tmp_path / "whole"
    out.rename(whole)
    extrapolate_here(*options)
    for part in ("samples", "scale-1"):  # as where the last of them was not finished
        shutil.rmtree(out / part)
    (out / "scale-1.json").unlink()
    extrapolate_here(*options)
    for name, tensor in weights_of(whole / "scale-1").items():
        assert torch.equal(weights_of(out / "scale-1")[name], tensor)
    figures = [json.loads((folder / "scale-1.json").read_text())["figures"] for folder in (whole, out)]
    assert figures[0] == figures[1]


def test_training_that_was_stopped_goes_on(run, extrapolate_here, tmp_path, monkeypatch):
    options, out, loss = (
        ("--training-steps", 3, "--scales", 1),
        tmp_path / "run-extrapolated",
        FlowMatching.loss,
    )
    extrapolate_here(*options)
    whole = out.rename(tmp_path / "whole")
    calls = []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(FlowMatching, "loss", stopping)
    assert "stopped at step 1 with a checkpoint" in extrapolate_here(*options, expect=143)
    extrapolate_here(*options)
    assert len(calls) == 5, "a trial of the memory and a step, a trial and the two steps that were left"
    for name, tensor in weights_of(whole / "scale-1").items():
        assert torch.equal(weights_of(out / "scale-1")[name], tensor)


def test_a_mistake_is_mended_by_the_right_command(run, extrapolate_here, tmp_path):
    """And other figures are found of the same samples and the same copy."""
    options = ("--training-steps", 1, "--scales", 1)
    extrapolate_here(*options, "--internal-guidance", "nan", expect=2)
    extrapolate_here(*options, "--sampler", "eulr", expect=2)
    extrapolate_here(*options)
    result = tmp_path / "run-extrapolated" / "scale-1.json"
    before = json.loads(result.read_text())
    output = extrapolate_here(*options, "--num-images", COUNT - 2, "--sampler", "euler", expect=2)
    assert "was begun with another sampler (None, now 'euler')" in output
    output = extrapolate_here(*options, "--num-images", COUNT - 2)
    assert "trained to step" not in output
    after = json.loads(result.read_text())
    assert (before["arguments"]["num_images"], after["arguments"]["num_images"]) == (COUNT, COUNT - 2)
    assert before["generated"]["weights_sha256"] == after["generated"]["weights_sha256"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num-samples", 0), "--num-samples is 0, expected at least 1"),
        (("--scales", "nan"), "expected finite numbers"),
        (("--scales", 1, 1.0000001), "of up to six digits"),
        (("--learning-rate", -1), "optimizer.learning_rate is -1.0, expected a number above 0"),
        (("--extractor", "iwin:missing"), "missing"),
        (("--extractor", "i3d:FILE"), "the run draws images, and i3d compares clips"),
        (("--extractor", "resnet"), "--extractor is resnet, expected inception"),
        (("--num-images", 0), "--num-images is 0, expected at least 1"),
        (("--reference", "missing"), "missing"),
        (("--guidance-scale", "nan"), "guidance_scale"),
    ],
)
def test_what_cannot_be_is_refused_before_training(extrapolate_here, tmp_path, arguments, words):
    output = extrapolate_here(*arguments, expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "run-extrapolated" / "copy").exists()


def test_a_folder_of_something_else_is_refused(run, extrapolate_here, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "holds other files" in extrapolate_here("--out", mine, expect=2)
    options = ("--training-steps", 1, "--scales", 1)
    extrapolate_here(*options)
    output = extrapolate_here(*options, "--seed", 1, expect=2)
    assert "was begun with another seed (0, now 1)" in output
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_networks_that_differ_are_refused():
    with pytest.raises(CheckpointError, match="other networks"):
        extrapolate({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 1.0)
