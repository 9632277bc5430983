"""Training end to end: runs of seconds through the scripts themselves."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_equal, kill_after, logged_steps, read_checkpoint, refused, run, start

from iwin_dit.config_schema import OptimizerConfig
from iwin_dit.training.ema import make_ema, update_ema
from iwin_dit.training.optimizer import build_adamw, learning_rate, named_state, parameter_groups


def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe, run_here, refused_here, tmp_path):
    """kill -9 after step 30 of 60, the same command again: weights, EMA and optimiser are the same bits."""
    config = recipe()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stdout, _ = run("train_dit.py", "--config", config, "--output_dir", whole)
    assert "trained to step 60" in stdout
    kill_after(start("train_dit.py", "--config", config, "--output_dir", broken), broken, step=32)
    run("train_dit.py", "--config", config, "--output_dir", broken)
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


def test_sigterm_stops_at_a_step_with_a_checkpoint(recipe, tmp_path):
    config = recipe(train={"max_steps": 100_000, "save_every_steps": 100_000})
    process = start("train_dit.py", "--config", config)
    while max(logged_steps(tmp_path / "run"), default=0) < 10:
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr[-2000:]
    step = int(stdout.split("stopped at step ")[1].split()[0])
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert 10 <= logged_steps(tmp_path / "run")[-1] <= step


def test_ddpm_accumulation_bf16_and_workers(recipe, tmp_path):
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
    run("train_dit.py", "--config", config)
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


def test_learning_rate_warms_up_and_stays():
    options = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(step, options, 8) for step in range(8)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    )
    assert learning_rate(0, OptimizerConfig(learning_rate=3e-4), 8) == 3e-4


def test_a_cosine_ends_at_the_least_rate():
    """PyTorch's own schedule, after the warm-up."""
    options = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule="cosine", min_learning_rate=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for step in range(3, 14):
        assert learning_rate(step, options, 13) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert learning_rate(20, options, 13) == pytest.approx(0.1)


def test_ema_is_the_weighted_sum():
    model = torch.nn.Linear(3, 2)
    ema, decay = make_ema(model), 0.9
    expected = model.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        update_ema(ema, model, decay)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weight, expected)
    assert not ema.weight.requires_grad


def test_an_average_has_the_statistics_of_its_model():
    """With those of its beginning a network with BatchNorm answers as if it were not trained."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ema, x = make_ema(model), 5 + torch.randn(64, 3)
    for _ in range(50):
        model(x)
        update_ema(ema, model, 0.0)  # the average is the model
    torch.testing.assert_close(ema(x), model.eval()(x))


def test_optimiser_state_makes_the_round_trip():
    """A second optimiser that was given the state of the first takes the same step."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_adamw(parameter_groups(m, 0.1), 1e-2, (0.9, 0.95), 1e-8) for m in models]
    x = torch.randn(4, 3)

    def step(i):
        models[i](x).square().sum().backward()
        optimizers[i].step()
        optimizers[i].zero_grad()

    step(0)
    models[1].load_state_dict(models[0].state_dict())
    mine, other = (named_state(o, m) for o, m in zip(optimizers, models, strict=True))
    for key, value in other.items():
        value.copy_(mine[key])
    step(0)
    step(1)
    assert torch.equal(models[0].weight, models[1].weight)
    assert optimizers[0].param_groups[1]["weight_decay"] == 0, "biases do not decay"
