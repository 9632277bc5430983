"""Gradient accumulation: the same global batch of 64 as one, four or sixteen micro-batches.

    python benchmarks/accumulation.py [--steps 60] [--rounds 3]

The quickstart's model, each run in a process of its own, in turn. Prints a table and draws accumulation.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
BATCH, MICRO_BATCHES = 64, (64, 16, 4)


def train(folder: Path, micro_batch: int, steps: int) -> tuple[list[float], float, float]:
    """Losses, images per second (the median of the log's lines) and the peak of resident memory in MiB."""
    arguments = {
        "output_dir": folder,
        "train.batch_images": BATCH,
        "train.micro_batch": micro_batch,
        "train.max_steps": steps,
        "train.log_every_steps": 1,
        "train.sample_every_steps": 0,
    }
    texts = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "train_dit.py", *texts],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"training with micro-batches of {micro_batch} failed")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return (
        [record["loss"] for record in log],
        median(record["images_per_second"] for record in log[5:]),
        usage.ru_maxrss / 1024,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = {micro_batch: [] for micro_batch in MICRO_BATCHES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for micro_batch in MICRO_BATCHES:
                found[micro_batch].append(
                    train(Path(folder) / f"{micro_batch}-{number}", micro_batch, options.steps)
                )
    reference = found[BATCH][0][0]
    print(
        "| micro-batches | images/s | peak memory, MiB | largest difference of the loss |\n|---|---|---|---|"
    )
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for micro_batch, runs in found.items():
        losses = runs[0][0]
        difference = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        speed, peak = (median(run[i] for run in runs) for i in (1, 2))
        print(f"| {micro_batch} x {BATCH // micro_batch} | {speed:.0f} | {peak:.0f} | {difference:.1e} |")
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            linewidth={64: 5, 16: 2.5, 4: 1}[micro_batch],  # they lie on each other
            label=f"{micro_batch} x {BATCH // micro_batch}: {speed:.0f} images/s, {peak:.0f} MiB",
        )
    axes.set(xlabel="step", ylabel="loss", title="The same batch of 64 in micro-batches")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
