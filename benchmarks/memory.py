"""Memory of training: the quickstart's peak, measured and computed, and an XL/1's with each lever.

    python benchmarks/memory.py

Nothing of the XL/1 is allocated: it is what ``--dry-run`` computes, for one GPU of eight.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from iwin_dit.build.budget import Budget
from iwin_dit.config.parse import parse_arguments

ROOT = Path(__file__).parent.parent
XL = ROOT / "configs" / "iwin_xl_1_imagenet256.yaml"
LEVERS = {
    "none": (),
    "every second block checkpointed": ("--train.gradient_checkpointing", "2"),
    "every block checkpointed": ("--train.gradient_checkpointing", "1"),
    "and the EMA on the CPU": ("--train.gradient_checkpointing", "1", "--ema.on_cpu", "true"),
    "or FSDP2 over 8": ("--train.gradient_checkpointing", "1", "--train.sharding", "fsdp2"),
}
MICRO_BATCHES = (1, 4, 16, 32, 64)


def peak_mib(*arguments: str) -> float:
    """Of the resident memory of a process."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)} failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    quickstart = ROOT / "configs" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder:
        short = ("--train.sample_every_steps", "0", "--train.save_every_steps", "1000")
        peaks = {
            images: peak_mib(
                *("train_dit.py", "--output_dir", f"{folder}/{images}", "--train.max_steps", "5", *short),
                *("--train.batch_images", str(images)),
            )
            for images in (1, 32, 128)
        }
    print("| images of a step | resident memory at the peak, MiB | above that of one image | computed |")
    print("|---|---|---|---|")
    saved = None
    for images, peak in peaks.items():
        config, _ = parse_arguments(["--train.batch_images", str(images)], quickstart)
        saved = saved or Budget(config).activations
        extra = (images - 1) * saved.image / 2**20
        print(f"| {images} | {peak:.0f} | {peak - peaks[1]:.0f} | {extra:.0f} |")

    print(
        "\n| XL/1, bf16, GiB on each of 8 GPUs, micro-batch | " + " | ".join(map(str, MICRO_BATCHES)) + " |"
    )
    print("|---" * (1 + len(MICRO_BATCHES)) + "|")
    for name, arguments in LEVERS.items():
        cells = []
        for micro_batch in MICRO_BATCHES:
            batch = ("--train.batch_images", "1024", "--train.micro_batch", str(micro_batch))
            budget = Budget(parse_arguments([*arguments, *batch], XL)[0])
            cells.append(f"{budget.memory(8).total / 2**30:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
