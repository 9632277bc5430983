"""Iwin beside Swin and Swin V2: parameters, multiply-adds, speed and memory at several image sizes.

    python benchmarks/backbones.py [--models T B] [--sizes 224 384 512] [--device cuda --dtype bf16]

Each size's models are timed in turn, round by round, in one process; what is compared is images/s per
multiply-add, beside Swin's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import iwin_dit.models  # registers the names
from iwin_dit.runtime.processes import keep_freed_memory

NAMES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
WINDOWS = {224: 7, 256: 8, 384: 12, 512: 16, 1024: 16}  # by image size
assert iwin_dit.models


def builders(letter: str, size: int) -> dict[str, tuple[str, dict]]:
    """Names and constructor arguments: the same windows for all, as the papers choose them."""
    word, options = NAMES[letter], dict(img_size=size, window_size=WINDOWS[size])
    found = {
        f"Iwin-{letter}": (f"iwin_{word}_patch4_window7_224", options),
        f"Swin-{letter}": (f"swin_{word}_patch4_window7_224", options),
    }
    if letter != "L":
        found[f"Swin V2-{letter}"] = (f"swinv2_{word}_window8_256", options)
    return found


def multiply_adds(name: str, options: dict) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image; on the meta device, where attention is counted too."""
    with torch.device("meta"):
        model = timm.create_model(name, **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, options["img_size"], options["img_size"], device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def step(model: nn.Module, images: torch.Tensor, backward: bool, dtype: torch.dtype) -> float:
    """Seconds of one pass."""
    started = time.perf_counter()
    enabled = dtype != torch.float32
    with torch.set_grad_enabled(backward), torch.autocast(images.device.type, dtype, enabled=enabled):
        loss = model(images).float().square().mean()
    if backward:
        loss.backward()
        model.zero_grad(set_to_none=True)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["T"], choices=NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384, 512], choices=WINDOWS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, help="images (default: as many as make 8 of 224 px)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device, dtype = arguments.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    keep_freed_memory()
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{card}, {torch.get_num_threads()} threads, {arguments.dtype}, torch {torch.__version__}")
    head = (
        "size | model | parameters, M | multiply-adds, G | forward, images/s | forward + backward, images/s"
    )
    head += " | per multiply-add, Iwin over it | peak, MiB"
    print(f"| {head} |\n{'|---' * (head.count('|') + 1)}|")
    for letter in arguments.models:
        for size in arguments.sizes:
            batch = arguments.batch or max(1, round(8 * (224 / size) ** 2))
            images = torch.randn(batch, 3, size, size, device=device)
            chosen = builders(letter, size)
            counts = {title: multiply_adds(*builder) for title, builder in chosen.items()}
            models = {title: timm.create_model(name, **o).to(device) for title, (name, o) in chosen.items()}
            times: dict[tuple[str, bool], list[float]] = {}
            peaks = {}
            for i in range(arguments.rounds + 1):  # the first is not counted
                for title, model in models.items():
                    if device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    for backward in (False, True):
                        seconds = step(model, images, backward, dtype)
                        if i:
                            times.setdefault((title, backward), []).append(seconds)
                    if device == "cuda":
                        peaks[title] = torch.cuda.max_memory_allocated() / 2**20
            rates = {key: batch / statistics.median(values) for key, values in times.items()}
            worth = {title: rates[title, True] * counts[title][1] for title in models}
            for title in models:
                parameters, operations = counts[title]
                cells = [size, title, f"{parameters / 1e6:.2f}", f"{operations / 1e9:.2f}"]
                cells += [f"{rates[title, False]:.2f}", f"{rates[title, True]:.2f}"]
                cells += [f"{worth[f'Iwin-{letter}'] / worth[title]:.2f}"]
                cells += [f"{peaks[title]:.0f}" if title in peaks else "-"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
