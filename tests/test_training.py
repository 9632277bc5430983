"""Training end to end: runs of seconds through the scripts themselves."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_equal, kill_after, logged_steps, read_checkpoint, refused, start


def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe, run_here, refused_here, tmp_path):
    """kill -9 after step 30 of 60, the same command again: weights, EMA and optimiser are the same bits."""
    config = recipe()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stdout = run_here("train_dit.py", "--config", config, "--output_dir", whole)
    assert "trained to step 60" in stdout
    kill_after(start("train_dit.py", "--config", config, "--output_dir", broken), broken, step=32)
    run_here("train_dit.py", "--config", config, "--output_dir", broken)
    assert_equal(read_checkpoint(whole, 60), read_checkpoint(broken, 60))
    assert logged_steps(whole) == logged_steps(broken) == list(range(2, 61, 2))

    records = [
        [json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (whole, broken)
    ]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    first, last = records[0][0]["loss"], records[0][-1]["loss"]
    assert last < 0.9 * first, "the loss falls"
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    assert (whole / "loss.png").stat().st_size > 10_000
    assert (whole / "pipeline" / "model_index.json").exists()

    # a finished run does nothing more, and goes on when max_steps grows; another model is refused
    run_here("train_dit.py", "--config", config, "--output_dir", whole)
    assert logged_steps(whole)[-1] == 60
    stdout = run_here("train_dit.py", "--config", config, "--output_dir", whole, "--train.max_steps", "64")
    assert "trained to step 64" in stdout
    assert logged_steps(whole)[-1] == 64
    error = refused_here("train_dit.py", "--config", config, "--output_dir", whole, "--model.depth", "3")
    assert "begun with another config (model.depth: 2 -> 3" in error

    # the newest checkpoint damaged: an error that names the good one, and nothing is written
    model = whole / "checkpoints" / "step-00000064" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-8])
    before = sorted(p.name for p in whole.rglob("*"))
    error = refused_here("train_dit.py", "--config", config, "--output_dir", whole, "--train.max_steps", "70")
    assert f"has {len(content) - 8} bytes, the manifest says {len(content)}" in error
    assert "go on from step-00000060" in error
    assert sorted(p.name for p in whole.rglob("*")) == before


def test_ddpm_accumulation_bf16_and_workers(recipe, run_here, tmp_path):
    """The other branches of the loop, in one run; its samples are drawn from the EMA."""
    config = recipe(
        objective={"name": "ddpm"},
        train={
            **{
                "max_steps": 4,
                "micro_batch": 2,
                "precision": "bf16",
                "num_workers": 1,
                "gradient_checkpointing": 2,
            },
            "sample_every_steps": 4,
        },
        model={
            "mixer": {"name": "global"},
            "position_embedding": "sincos+rope",
            "mlp": "gelu",
            "qk_norm": True,
        },
    )
    run_here("train_dit.py", "--config", config)
    state = read_checkpoint(tmp_path / "run", 4)
    assert all(t.dtype == torch.float32 for group in state.values() for t in group.values())
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]


@pytest.mark.slow
def test_a_launch_that_became_one_process_is_noticed(recipe):
    """`accelerate launch --cpu --num_processes 2` silently starts a single process."""
    launcher = (str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "2")
    error = refused("train_dit.py", "--config", recipe(), launcher=launcher, expect=1)
    assert "several processes were asked for, but 1 runs" in error
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in error


def test_mistakes_are_found_before_the_first_step(recipe, refused_here, tmp_path):
    """What the config alone cannot tell: latents, paths."""
    error = refused_here("train_dit.py", "--config", recipe(model={"in_channels": 16}))
    assert "has latent channels 4" in error
    assert "model.in_channels is 16" in error
    (tmp_path / "file").write_text("")
    error = refused_here("train_dit.py", "--config", recipe(), "--output_dir", tmp_path / "file" / "run")
    assert "cannot be written" in error
    assert not (tmp_path / "file" / "run").exists()


def test_dry_run_says_what_a_run_takes(recipe, run_here, tmp_path):
    stdout = run_here("train_dit.py", "--config", recipe(), "--dry-run")
    described = dict(
        line.split("  ", 1) for line in stdout.splitlines() if "  " in line and not line.startswith(" ")
    )
    assert described["an epoch"].strip() == "7.5 steps (60 images)"
    assert "8 x 8 = 64, windows of 4 x 4" in described["tokens"]
    assert yaml.safe_load(stdout.split("\n\n")[0])["train"]["max_steps"] == 60
    assert not (tmp_path / "run").exists()
