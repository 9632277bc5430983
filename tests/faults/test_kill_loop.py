"""kill -9 at fifty (or KILLS) random moments of the quickstart, and the same command after each (row 2)."""

import os
import random
import signal
import time

import pytest
from conftest import ROOT, assert_equal, read_checkpoint, start

from iwin_dit.data import digits
from iwin_dit.runtime import checkpoint

KILLS = int(os.environ.get("KILLS", "50"))
STEPS, LONGEST_LIFE = 240, 2.0  # seconds after the run has its lock


@pytest.mark.slow
def test_fifty_kills_change_no_bit(tmp_path):
    latents = ROOT / "data" / "digits"
    if not (latents / "index.json").exists():
        latents = tmp_path / "digits"
        digits.prepare(latents)
    rng = random.Random(0)
    quickstart = ("train_dit.py", "--data.path", latents, "--train.max_steps", STEPS)
    often = (
        "--train.save_every_steps",
        4,
        "--train.sample_every_steps",
        60,
        "--sample.num_inference_steps",
        2,
    )

    def begin(run):
        return start(*quickstart, *often, "--output_dir", run, OMP_NUM_THREADS=str(os.cpu_count()))

    process = begin(tmp_path / "whole")
    assert process.wait(timeout=600) == 0, process.stderr.read()

    run, kills, finished = tmp_path / "killed", 0, 0
    while kills < KILLS:
        process = begin(run)
        lock = f"pid {process.pid} "
        while process.poll() is None and not _holds(run, lock):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, LONGEST_LIFE))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        else:
            assert process.returncode == 0, process.stderr.read()
            finished += 1
        process.communicate()
        for path in checkpoint.step_directories(run / "checkpoints"):
            checkpoint.verify(path)
    process = begin(run)
    assert process.wait(timeout=600) == 0, process.stderr.read()
    print(f"{kills} kills, {kills + 1 + finished} starts, {finished} of them after the end")
    assert finished < KILLS // 5, "most kills hit a run that was under way"
    assert_equal(read_checkpoint(run, STEPS), read_checkpoint(tmp_path / "whole", STEPS))


def _holds(run, lock):
    path = run / "lock"
    return path.exists() and path.read_text().startswith(lock)
