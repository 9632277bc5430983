"""A training step whose middle blocks see one token of each 2 x 2, beside the same on all tokens.

    python benchmarks/token_dropping.py [--device cuda] [--size B/1] [--rounds 5] [--sides 32 64]

The first and the last two blocks see all tokens, the batch is one image. A step is forward, backward and
AdamW. The two take turns in one process; a figure is the median over rounds of all tokens over dropped ones:
above 1, dropping is faster. On a CPU the time is that of the process, which other programs hardly lengthen.
Beside it stands the ratio that the multiply-adds allow.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from iwin_dit.build.budget import multiply_adds
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.runtime.processes import keep_freed_memory

MIXERS = {"iwin": {"name": "iwin"}, "global": {"name": "global"}}
COLUMNS = ("mixer", "tokens", "step, ms (all / dropped)", "ratio", "ratio allowed by multiply-adds")


def make(size: str, mixer: str, side: int) -> IwinDiTTransformer2DModel:
    torch.manual_seed(0)
    return IwinDiTTransformer2DModel.from_size(
        size,
        sample_size=side,
        mixer=MIXERS[mixer],
        position_embedding="none" if mixer == "iwin" else "sincos",
        dense_blocks=(2, 2),
    )


def make_step(model: IwinDiTTransformer2DModel, side: int, device: str) -> Callable[[bool], float]:
    """``step(drops)``: the seconds of one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, label = torch.randn(1, 32, side, side, device=device), torch.zeros(1, dtype=torch.long, device=device)
    u = torch.full((1,), 0.6, device=device)
    clock = time.perf_counter if device == "cuda" else time.process_time

    def step(drops: bool) -> float:
        started = clock()
        output = model(x, 1000 * u, label, kept=u if drops else None, skip_middle=u > 1)
        output.sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="B/1", help="of the model; patches of one latent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=(32, 64))
    options = parser.parse_args()
    keep_freed_memory()
    name = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for side in options.sides:
        for mixer in MIXERS:
            with torch.device("meta"):
                counts = [
                    multiply_adds(make(options.size, mixer, side), thinned) for thinned in (False, True)
                ]
            model = make(options.size, mixer, side).to(options.device).train()
            step = make_step(model, side, options.device)
            for drops in (False, True):
                step(drops)
            times = [(step(False), step(True)) for _ in range(options.rounds)]
            dense, sparse = (1e3 * median(column) for column in zip(*times, strict=True))
            ratio = median(all_ / dropped for all_, dropped in times)
            cells = [mixer, f"{side**2:,}", f"{dense:.0f} / {sparse:.0f}", f"**{ratio:.2f}**"]
            print(f"| {' | '.join([*cells, f'{counts[0] / counts[1]:.2f}'])} |", flush=True)


if __name__ == "__main__":
    main()
