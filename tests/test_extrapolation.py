"""``iwin-dit extrapolate``: samples, a copy that learns from them, and the way past the model."""

import json
import shutil
import sys

import pytest
import torch
from evaluation_stub import COUNT, Stub, make_sets
from safetensors.torch import load_file

from iwin_dit import commands
from iwin_dit.build.extrapolation import extrapolate
from iwin_dit.build.loading import load_pipeline
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
    output = extrapolate_here("--training-steps", 3, "--weights", 1, -0.5, "--batch-size", 4)
    model, copy = load_file(run / WEIGHTS), load_file(out / "copy" / WEIGHTS)
    assert any(not torch.equal(model[name], copy[name]) for name in model)
    assert all(torch.equal(tensor, model[name]) for name, tensor in weights_of(out / "weight-0").items())
    for weight in (1, -0.5):
        found = weights_of(out / f"weight-{weight:g}")
        for name, theta in model.items():
            torch.testing.assert_close(found[name], (1 + weight) * theta - weight * copy[name])

    figures = {
        w: json.loads((out / f"weight-{w}.json").read_text())["figures"]["fid"] for w in ("-0.5", "0", "1")
    }
    best = min(figures, key=figures.get)
    assert f"best is weight {best}; try: python sample.py --checkpoint {out}/weight-{best}" in output
    assert output.count("| weight ") == 3

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

    written = {path: path.stat().st_mtime_ns for path in out.glob("weight-*")}
    output = extrapolate_here("--training-steps", 3, "--weights", 1, 2, "--batch-size", 8)
    assert output.count("| weight ") == 3
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what is there stays"
    assert (out / "weight-2").is_dir()


def test_what_was_interrupted_goes_on_to_the_same_bits(run, extrapolate_here, tmp_path):
    options = ("--training-steps", 2, "--weights", 1)
    extrapolate_here(*options)
    out, whole = tmp_path / "run-extrapolated", tmp_path / "whole"
    out.rename(whole)
    extrapolate_here(*options)
    for part in ("samples", "weight-1"):  # as where the last of them was not finished
        shutil.rmtree(out / part)
    (out / "weight-1.json").unlink()
    extrapolate_here(*options)
    for name, tensor in weights_of(whole / "weight-1").items():
        assert torch.equal(weights_of(out / "weight-1")[name], tensor)
    figures = [json.loads((folder / "weight-1.json").read_text())["figures"] for folder in (whole, out)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num-samples", 0), "--num-samples is 0, expected at least 1"),
        (("--weights", "nan"), "expected finite numbers"),
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
    options = ("--training-steps", 1, "--weights", 1)
    extrapolate_here(*options)
    output = extrapolate_here(*options, "--seed", 1, expect=2)
    assert "was begun with another seed (0, now 1)" in output
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_networks_that_differ_are_refused():
    with pytest.raises(CheckpointError, match="different networks"):
        extrapolate({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 1.0)
