"""Where the time of the quickstart goes: model, update, checkpoints, and the loop around them.

    python benchmarks/overhead.py [--steps 300]

Trains the quickstart in this process, with a clock on each part, and a checkpoint every 100 steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from iwin_dit.commands import train  # noqa: E402
from iwin_dit.config.parse import parse_arguments  # noqa: E402
from iwin_dit.diffusion.flow_matching import FlowMatching  # noqa: E402
from iwin_dit.training import checkpoints, loop  # noqa: E402

seconds: dict[str, float] = defaultdict(float)


def clock(part: str, owner: object, name: str) -> None:
    """From now on, time in ``owner.name`` counts for ``part``."""
    real = getattr(owner, name)

    def timed(*args, **kwargs):
        started = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - started

    setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    clock("model", FlowMatching, "loss")
    clock("model", Accelerator, "backward")
    clock("update", torch.nn.utils, "clip_grad_norm_")
    clock("update", loop, "step_if_finite")
    clock("update", loop, "update_ema")
    clock("checkpoints", checkpoints, "save")
    clock("all", loop, "train")
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": Path(folder) / "run",
            "train.max_steps": options.steps,
            "train.save_every_steps": 100,
            "train.sample_every_steps": 0,
        }
        texts = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
        train.train(parse_arguments(texts, train.QUICKSTART)[0])
    total = seconds.pop("all")
    steps = total - seconds["checkpoints"]
    seconds["loop"] = steps - seconds["model"] - seconds["update"]
    print(f"\n{options.steps} steps of 32 images, {1000 * steps / options.steps:.1f} ms each\n")
    print("| part | share |\n|---|---|")
    for part, name in (
        ("model", "forward and backward, of a step"),
        ("update", "clipping, AdamW and EMA, of a step"),
        ("loop", "all else (data, reports, log, bar), of a step"),
    ):
        print(f"| {name} | {seconds[part] / steps:.1%} |")
    print(f"| checkpoints every 100 steps, of the wall time | {seconds['checkpoints'] / total:.1%} |")


if __name__ == "__main__":
    main()
