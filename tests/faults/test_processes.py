"""Two processes see what one sees, stop together, share a split model, hold the same (rows 12, 15, 24)."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_equal, read_checkpoint, run

from iwin_dit.runtime import checkpoint

pytestmark = pytest.mark.slow

ACCELERATE = str(Path(sys.executable).parent / "accelerate")
TWO_PROCESSES = (
    *(ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
# Written beside a test, and run instead of train_dit.py: what each process sees goes to a file of its own.
WATCHED = f"""
import os, runpy, signal, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
from iwin_dit.diffusion.flow_matching import FlowMatching
real, calls = FlowMatching.loss, []
rank = int(os.environ.get("RANK", "0"))
def loss(self, model, x0, labels, noise, u):
    calls.append((x0.clone(), labels.clone(), noise.clone(), u.clone()))
    if rank == 1 and len(calls) == 7 and os.environ.get("HAPPENS") == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if rank == 1 and len(calls) == 7 and os.environ.get("HAPPENS") == "weights":
        with torch.no_grad():
            list(model.parameters())[-1].view(-1)[-1] += 1e-6
    value = real(self, model, x0, labels, noise, u)
    return value * (torch.nan if rank == 1 and len(calls) == 7 and os.environ.get("HAPPENS") == "nan" else 1)
FlowMatching.loss = loss
if rank == 1 and os.environ.get("HAPPENS") == "data":
    from iwin_dit.data.latents import LatentDataset
    theirs = LatentDataset.identity.fget
    LatentDataset.identity = property(lambda self: theirs(self) | {{"vae_sha256": "0"}})
try:
    runpy.run_path({str(ROOT / "train_dit.py")!r}, run_name="__main__")
finally:
    calls and torch.save([torch.stack(parts) for parts in zip(*calls)], os.environ["SEEN"] + f".{{rank}}")
"""


@pytest.fixture
def watched(tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)

    def call(processes, seen, *arguments, **options):
        launcher = TWO_PROCESSES if processes == 2 else ()
        environment = (
            {"ACCELERATE_USE_CPU": "true", "SEEN": str(seen)} if processes == 2 else {"SEEN": str(seen)}
        )
        try:
            return run(script, *arguments, launcher=launcher, **environment, **options)
        except AssertionError as failure:
            if "(SIGABRT)" not in str(failure):
                raise
            # A process of gloo's was seen to abort once in a hundred runs or so, not why. What is promised is
            # that the same command goes on from there, to the same end.
            warnings.warn(f"aborted, and run again: {failure!s:.8000}", stacklevel=2)
            return run(script, *arguments, launcher=launcher, **environment, **options)

    return call


def read_seen(path, processes):
    """Latents, labels, noise and times of each step over all processes: ``(steps, B, ...)``."""
    parts = [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(processes)]
    return [torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)]


def test_any_number_of_processes_sees_the_same_and_ends_alike(recipe, watched, tmp_path):
    """50 steps on one process; on two, one, two; and split over two by FSDP2, then on one."""
    config = recipe(
        train={"max_steps": 50, "save_every_steps": 25},
        optimizer={"learning_rate": 1e-4, "eps": 1e-5},
        ema={"decays": [0.9], "power_stds": [0.1]},
    )

    def train(processes, name, steps, *more):
        seen = tmp_path / f"seen-{name}-{steps}"
        arguments = ("--config", config, "--output_dir", tmp_path / name, "--train.max_steps", steps)
        watched(processes, seen, *arguments, *more)
        return read_seen(seen, processes)

    one = train(1, "one", 50)
    pieces = {
        "changing": [train(2, "changing", 20), train(1, "changing", 35), train(2, "changing", 50)],
        "split": [
            train(2, "split", 25, "--train.sharding", "fsdp2"),
            train(1, "split", 50),
        ],
    }
    expected = read_checkpoint(tmp_path / "one", 50)
    for name, parts in pieces.items():
        for found, reference in zip(zip(*parts, strict=True), one, strict=True):
            assert torch.equal(torch.cat(found), reference), f"{name}: data, labels, noise or times differ"
        found = read_checkpoint(tmp_path / name, 50)
        for group in ("model", "ema", "ema_std_0.1"):
            assert_equal({group: found[group]}, {group: expected[group]}, atol=1e-6, rtol=0)
    assert_equal(
        read_checkpoint(tmp_path / "split", 25), read_checkpoint(tmp_path / "one", 25), atol=1e-6, rtol=1e-4
    )

    # a split model takes what a plain one has written, too, and draws from it
    arguments = ("--config", config, "--output_dir", tmp_path / "one", "--train.max_steps", 52)
    sharded = ("--train.sharding", "fsdp2", "--train.sample_every_steps", 52)
    watched(2, tmp_path / "seen-more", *arguments, *sharded)
    watched(1, tmp_path / "seen-plain", *arguments[:3], tmp_path / "changing", *arguments[4:])
    assert_equal(
        {"ema": read_checkpoint(tmp_path / "one", 52)["ema"]},
        {"ema": read_checkpoint(tmp_path / "changing", 52)["ema"]},
        atol=1e-6,
        rtol=0,
    )
    assert (tmp_path / "one" / "samples" / "step-00000052.png").exists()


def test_a_signal_to_one_process_stops_both_at_one_step(recipe, watched, tmp_path):
    config = recipe(train={"max_steps": 50, "save_every_steps": 25})
    _, stderr = watched(2, tmp_path / "seen", "--config", config, expect=1, HAPPENS="signal")
    assert "exitcode  : 143" in stderr
    saved = checkpoint.step_directories(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000007"]
    assert [len(torch.load(f"{tmp_path}/seen.{rank}", weights_only=True)[0]) for rank in (0, 1)] == [7, 7]


def test_a_loss_that_is_not_finite_on_one_process_stops_both(recipe, watched, tmp_path):
    config = recipe(train={"max_steps": 50, "save_every_steps": 5})
    _, stderr = watched(2, tmp_path / "seen", "--config", config, expect=1, HAPPENS="nan")
    assert stderr.count("error: training diverged at step 7") == 2
    saved = checkpoint.step_directories(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000005"]


def test_weights_that_differ_are_noticed_before_a_checkpoint(recipe, watched, tmp_path):
    """By a millionth in one value, from the seventh step on; the first process is not blamed."""
    config = recipe(train={"max_steps": 50, "save_every_steps": 5})
    _, stderr = watched(2, tmp_path / "seen", "--config", config, expect=1, HAPPENS="weights")
    assert stderr.count("error: at step 10 process 1 does not hold the weights, averages") == 2, stderr
    assert "exitcode  : 7" in stderr
    saved = checkpoint.step_directories(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000005"]


def test_data_that_differ_are_noticed_at_start(recipe, watched, tmp_path):
    _, stderr = watched(2, tmp_path / "seen", "--config", recipe(), expect=1, HAPPENS="data")
    assert stderr.count("error: process 1 does not read the same data as the others: vae_sha256 differs") == 2
    assert not (tmp_path / "run").exists()
