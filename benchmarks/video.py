"""A block of a transformer of clips with Iwin, full and factorised attention.

    python benchmarks/video.py [--device cuda] [--rounds 7]

Width 384, 6 heads, MLP ratio 4 (GELU), layer norm, float32, 16,384 tokens a batch, forward and backward of
the whole block. *iwin* has the automatic window, *iwin, half* half of it along the width. *factorised* is
attention over the tokens of each frame, then over the frames of each place, with projections for both;
*alternating* is the mean of a block of the one and a block of the other kind, as Latte (Ma et al. 2024) has
them. All are timed in turn in one process; a ratio is the median over rounds of a kind's time over Iwin's:
above 1, Iwin is faster. Memory is the peak above weights and input, in a process of its own. The last column
counts stacked blocks until every token depends on every other.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
from statistics import median

import torch
from mixers import forward, forward_backward, peak_of, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.layers import windows
from iwin_dit.layers.block import Block
from iwin_dit.layers.global_attention import FactorisedMixer, SpatialMixer, TemporalMixer
from iwin_dit.layers.specs import BlockSpec, MixerSpec
from iwin_dit.runtime.processes import keep_freed_memory

TOKENS, WIDTH, HEADS = 16_384, 384, 6
GRIDS = [(8, 16, 16), (16, 32, 32)]
KINDS = ("iwin", "iwin, half", "full", "factorised", "spatial", "temporal")
COLUMNS = (
    "attention",
    "window",
    "ms",
    "over Iwin",
    "allowed by multiply-adds",
    "peak, MiB",
    "blocks to connect all",
)


OTHERS: dict[str, type[nn.Module]] = {
    "factorised": FactorisedMixer,
    "spatial": SpatialMixer,
    "temporal": TemporalMixer,
}


def mixer_of(kind: str, grid: tuple[int, ...]) -> MixerSpec:
    if not kind.startswith("iwin"):
        return MixerSpec("global")
    frames, height, width = MixerSpec().window(grid)
    return MixerSpec(window_size=[frames, height, width // 2 if kind == "iwin, half" else width])


def make(kind: str, grid: tuple[int, ...], device: str) -> tuple[Block, Tensor, Tensor]:
    """The block, its residual stream (B, T, H, W, D), and the condition (B, D)."""
    torch.manual_seed(0)
    spec = BlockSpec(WIDTH, HEADS, mixer=mixer_of(kind, grid), mlp="gelu", norm="layer_norm")
    with torch.device(device):
        block = Block(spec, grid)
        if kind in OTHERS:
            block.mixer = OTHERS[kind](spec, grid)
        batch = TOKENS // math.prod(grid)
        return block, torch.randn(batch, *grid, WIDTH), torch.randn(batch, WIDTH)


def times(grid: tuple[int, ...], device: str, rounds: int) -> list[dict[str, float]]:
    """Seconds of each kind, round by round."""
    made = {kind: make(kind, grid, device) for kind in KINDS}
    for arguments in made.values():
        seconds(forward_backward, arguments, device)
    found = []
    for _ in range(rounds):
        one = {kind: seconds(forward_backward, made[kind], device) for kind in KINDS}
        found.append(one | {"alternating": (one["spatial"] + one["temporal"]) / 2})
    return found


def multiply_adds(kind: str, grid: tuple[int, ...]) -> float:
    if kind == "alternating":
        return (multiply_adds("spatial", grid) + multiply_adds("temporal", grid)) / 2
    with FlopCounterMode(display=False) as counter:
        forward(*make(kind, grid, "meta"))
    return counter.get_total_flops() / 2


def peak_memory(kind: str, grid: tuple[int, ...], device: str) -> float:
    """MiB above weights, gradients and input."""
    return peak_of(make(kind, grid, device), device)


def blocks_to_connect(grid: tuple[int, ...], spec: MixerSpec, sources: int = 256) -> int:
    """Stacked Iwin blocks after which every token has reached every other.

    Followed from each token of an octant: mirrored along an axis, windows are windows and kernels kernels.
    """
    window, kernel = spec.window(grid), spec.kernel_sides(grid)
    octant = torch.cartesian_prod(*(torch.arange((side + 1) // 2) for side in grid))
    most = 0
    for places in octant.split(sources):
        reached = torch.zeros(len(places), *grid)
        reached[torch.arange(len(places)), *places.T] = 1
        blocks = 0
        while not reached.all():
            near = nn.functional.max_pool3d(reached[:, None], kernel, 1, [side // 2 for side in kernel])[:, 0]
            groups = windows.partition(reached[..., None], window)  # (B G, N, 1)
            far = windows.reverse(groups.amax(1, keepdim=True).expand_as(groups), window, grid)[..., 0]
            reached, blocks = torch.maximum(near, far), blocks + 1
        most = max(most, blocks)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    is_gpu = options.device == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| tokens | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # a fresh process gives freed tensors back: the peak shows
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for grid in GRIDS:
            rounds = times(grid, options.device, options.rounds)
            memory = {kind: fresh.apply(peak_memory, (kind, grid, options.device)) for kind in KINDS}
            memory["alternating"] = (memory["spatial"] + memory["temporal"]) / 2
            connected = {"full": 1, "factorised": 1, "alternating": 2}
            for kind in ("iwin", "iwin, half"):
                connected[kind] = blocks_to_connect(grid, mixer_of(kind, grid))
            for kind in ("iwin", "iwin, half", "full", "factorised", "alternating"):
                window = mixer_of(kind, grid).window(grid) if kind.startswith("iwin") else ()
                ratio = median(one[kind] / one["iwin"] for one in rounds)
                allowed = multiply_adds(kind, grid) / multiply_adds("iwin", grid)
                cells = [
                    " x ".join(map(str, grid)),
                    kind,
                    " x ".join(map(str, window)) or "-",
                    f"{1e3 * median(one[kind] for one in rounds):.0f}",
                    f"**{ratio:.2f}**",
                    f"{allowed:.2f}",
                    f"{memory[kind]:.0f}",
                    str(connected[kind]),
                ]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
