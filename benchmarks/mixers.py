"""A whole transformer block with Iwin attention beside the same block with global attention.

    python benchmarks/mixers.py [--device cuda] [--pairs 9]

Width 768, 12 heads, MLP ratio 4 (GELU), layer norm, 4,096 tokens a batch. The two blocks are timed in turn in
one process; a figure is the median over pairs of global over Iwin: above 1, Iwin is faster. Beside each
stands the ratio that their multiply-adds allow. Memory is the peak of forward and backward above weights and
input, measured in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.layers.block import Block
from iwin_dit.layers.specs import BlockSpec, MixerSpec
from iwin_dit.runtime.processes import keep_freed_memory

TOKENS, WIDTH, HEADS = 4096, 768, 12
CASES = [(16, 8), (32, 16), (64, 32), (64, 16)]  # side of the grid, window
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = (
    *("dtype", "tokens", "window", "forward, ms (Iwin / global)", "ratio", "forward + backward, ms", "ratio"),
    *("ratio allowed by multiply-adds", "peak, MiB (Iwin / global)"),
)
PROC_STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make(
    mixer: str, side: int, window: int, dtype: torch.dtype, device: str
) -> tuple[Block, torch.Tensor, torch.Tensor]:
    """The block, its residual stream (B, side, side, D) in float32, and the condition (B, D)."""
    torch.manual_seed(0)
    spec = MixerSpec(window_size=window) if mixer == "iwin" else MixerSpec("global")
    spec = BlockSpec(WIDTH, HEADS, mixer=spec, mlp="gelu", norm="layer_norm")
    with torch.device(device):
        block = Block(spec, (side, side)).to(dtype)
        batch = TOKENS // side**2
        return block, torch.randn(batch, side, side, WIDTH), torch.randn(batch, WIDTH, dtype=dtype)


def forward(block: Block, x: torch.Tensor, condition: torch.Tensor) -> None:
    with torch.no_grad():
        block(x, condition)


def forward_backward(block: Block, x: torch.Tensor, condition: torch.Tensor) -> None:
    block.zero_grad()
    block(x.detach().requires_grad_(), condition).sum().backward()


def seconds(function, arguments, device: str) -> float:
    started = time.perf_counter()
    function(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(
    function, side: int, window: int, dtype: torch.dtype, device: str, pairs: int
) -> tuple[float, float, float]:
    """Milliseconds of Iwin and global, and the median ratio of the pairs."""
    made = {mixer: make(mixer, side, window, dtype, device) for mixer in ("iwin", "global")}
    for arguments in made.values():
        seconds(function, arguments, device)
        seconds(function, arguments, device)
    times = [{mixer: seconds(function, made[mixer], device) for mixer in made} for _ in range(pairs)]
    iwin, dense = (1e3 * median(t[mixer] for t in times) for mixer in ("iwin", "global"))
    return iwin, dense, median(t["global"] / t["iwin"] for t in times)


def multiply_adds(mixer: str, side: int, window: int) -> int:
    arguments = make(mixer, side, window, torch.float32, "meta")
    with FlopCounterMode(display=False) as counter:
        forward(*arguments)
    return counter.get_total_flops() // 2


def peak_memory(mixer: str, side: int, window: int, dtype: str, device: str) -> float:
    """MiB above weights, gradients and input."""
    return peak_of(make(mixer, side, window, DTYPES[dtype], device), device)


def peak_of(arguments: tuple[Block, torch.Tensor, torch.Tensor], device: str) -> float:
    """MiB of forward and backward, above what is there before."""
    forward_backward(*arguments)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(*arguments)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    CLEAR_REFS.write_text("5")  # resets the high-water mark of the resident set (Linux)
    before = resident("VmRSS")
    forward_backward(*arguments)
    return (resident("VmHWM") - before) / 2**10


def resident(key: str) -> int:
    line = next(line for line in PROC_STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()
    name = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # a fresh process gives freed tensors back, so that the peak shows
    )
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for dtype in DTYPES:
            for side, window in CASES:
                case = (side, window, DTYPES[dtype], options.device, options.pairs)
                cells = []
                for function in (forward, forward_backward):
                    iwin, dense, ratio = compare(function, *case)
                    cells += [f"{iwin:.0f} / {dense:.0f}", f"**{ratio:.2f}**"]
                allowed = multiply_adds("global", side, window) / multiply_adds("iwin", side, window)
                tasks = [(mixer, side, window, dtype, options.device) for mixer in ("iwin", "global")]
                memory = " / ".join(f"{fresh.apply(peak_memory, task):.0f}" for task in tasks)
                row = [dtype, f"{side} x {side}", str(window), *cells, f"{allowed:.2f}", memory]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
