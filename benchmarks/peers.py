"""Whole models side by side: a training step and a sampling step of Iwin-DiT and of its peers.

    python benchmarks/peers.py                                       B/1 on this CPU, float32
    python benchmarks/peers.py --device cuda --compile none blocks   XL/1, bfloat16

iwin: this project's model with automatic windows; iwin_sdpa: the same weights without this project's kernels;
global: the same model with attention over all tokens and sin-cos positions; diffusers: its
DiTTransformer2DModel; swin: timm's blocks, unconditional; natten: this project's model with neighbourhoods.
All have one depth, width, number of heads, patch size and window, and DiT's norm and MLP. A training step is
forward, backward and fused AdamW (in bf16 under autocast, on float32 weights), a sampling step is a forward
pass without guidance (in bf16 with bfloat16 weights).

The models are timed in turn in one process. *x Iwin* is the median over rounds of a model's time over that of
Iwin compiled alike: above 1, Iwin is faster. *allowed* is the ratio of their multiply-adds. *share* is of the
matrix-multiply rate that is measured at the start, counting two operations a multiply-add, three forward
passes a training step. *GiB* is the peak of weights, gradients, optimiser and activations; on a CPU it takes
fresh processes, and ``--memory``. A training step that would not fit the memory is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from mixers import CLEAR_REFS, DTYPES, resident
from peers_models import (
    MODELS,
    VARIANTS,
    Case,
    DoesNotFit,
    Peer,
    Roster,
    Shape,
    free_memory,
    multiply_adds,
    unavailable,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from iwin_dit.layers import kernels
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.processes import keep_freed_memory
from iwin_dit.runtime.progress import progress, say

COLUMNS = ("tokens", "batch", "step", "model", "ms", "x Iwin", "allowed", "share", "GiB")
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SCOPES = ("none", "blocks", "model")
CELL_SECONDS = 2.5  # on CUDA: of one model and step
INNER_SECONDS = 0.05  # on CUDA: shorter steps are repeated for one time
LONG_SECONDS = 30.0  # a step of more counts even if it is the first


# -- Times


@dataclass
class Times:
    """Of one model, compiled or not."""

    name: str
    scope: str
    seconds: list[float] = field(default_factory=list)  # a step, one for each round
    repeats: int = 1
    peak_bytes: int | None = None
    why_not: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.scope == "none" else f"{self.name}, compiled {self.scope}"


class Clock:
    """Times models in turn.

    Args:
        rounds: times of each.
        kernel: what :func:`iwin_dit.layers.kernels.select` gets.
        attention: the backend that is in force, for messages.
        deadline: no model is begun after it, in ``time.monotonic()``.
    """

    def __init__(self, rounds: int, kernel: str, attention: str, deadline: float):
        self.rounds, self.kernel, self.attention, self.deadline = rounds, kernel, attention, deadline

    def measure(self, models: Roster, rows: list[Times], bar: tqdm) -> None:
        """Fills the rows."""
        limit = CELL_SECONDS if models.case.device == "cuda" else math.inf
        for row in rows:
            if row.why_not is None and self.is_late():
                row.why_not = "no time left"
            self.attempt(models, row, self.warm_up)
            bar.update()
        for done in range(self.rounds):
            for row in rows:
                is_long = done >= 3 and sum(row.seconds) * row.repeats > limit
                if len(row.seconds) <= done and not is_long and not (done and self.is_late()):
                    self.attempt(models, row, self.time)
                bar.update()

    def attempt(self, models: Roster, row: Times, action: Callable[[Peer, Times], None]) -> None:
        """Does ``action`` with the model and its kernels, compiled where the row says so."""
        if row.why_not is not None:
            return
        kernels.select("torch" if row.name in VARIANTS else self.kernel)
        stance = "force_eager" if row.scope == "none" else "default"
        try:
            with models.use(row.name) as peer, torch.compiler.set_stance(stance):
                action(peer, row)
        except (DoesNotFit, torch.OutOfMemoryError):
            row.why_not = "does not fit the memory"
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            row.why_not = f"no {self.attention} attention"
        finally:
            kernels.select("auto")
        if row.why_not is not None:  # outside the handler, whose traceback holds the activations
            models.drop(row.name)

    def warm_up(self, peer: Peer, row: Times) -> None:
        """Compiles, touches the memory, and finds how often to repeat a step."""
        if peer.is_cuda:
            peer.step()
            peer.step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = seconds_of(peer)
            row.peak_bytes = torch.cuda.max_memory_allocated() - before + peer.resident_bytes()
            row.repeats = max(1, min(20, math.ceil(INNER_SECONDS / seconds)))
        else:
            seconds = seconds_of(peer)
            if seconds > LONG_SECONDS:
                row.seconds.append(seconds)

    def time(self, peer: Peer, row: Times) -> None:
        row.seconds.append(seconds_of(peer, row.repeats))

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline


def seconds_of(peer: Peer, repeats: int = 1) -> float:
    """Of one step."""
    if peer.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        peer.step()
    if peer.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large matrix multiplication, the best of several."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    fastest = math.inf
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * side**3 / fastest


def peak_in_a_fresh_process(case: Case, name: str) -> int:
    """Bytes that the second step of a model takes on a CPU, weights and all."""
    before = resident("VmRSS")
    peer = case.make(name)
    peer.step()
    CLEAR_REFS.write_text("5")  # resets the high-water mark of the resident set (Linux)
    peer.step()
    return 1024 * (resident("VmHWM") - before)


# -- The table


def cells(row: Times, rows: list[Times], adds: dict[str, int], case: Case, rate: float) -> list[str]:
    """One row: tokens, batch, step, model, ms, x Iwin, allowed, share, GiB."""
    start = [str(case.side**2), str(case.batch), "training" if case.training else "sampling", row.label]
    if row.why_not is not None:
        return [*start, row.why_not, "", "", "", ""]
    iwin = next((r.seconds for r in rows if (r.name, r.scope) == ("iwin", row.scope)), [])
    ratios = [ours / base for ours, base in zip(row.seconds, iwin, strict=False)]
    allowed = adds[row.name] / adds["iwin"]
    operations = 2 * adds[row.name] * case.batch * (3 if case.training else 1)
    return [
        *start,
        f"{1000 * median(row.seconds):.4g}",
        f"**{median(ratios):.2f}**" if ratios else "",
        f"{allowed:.2f}",
        f"{operations / median(row.seconds) / rate:.0%}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", help="default: B/1 on a CPU, XL/1 on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all that differ here")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--rounds", type=int, help="default: 5 on a CPU, 20 on CUDA, within 2.5 s a cell")
    parser.add_argument("--batch-tokens", type=int, help="default: 4096 on a CPU, 16384 on CUDA")
    parser.add_argument("--steps", nargs="+", default=["training", "sampling"])
    parser.add_argument("--compile", nargs="+", choices=SCOPES, default=["none"], help="none is eager")
    parser.add_argument("--kernels", default="auto", choices=("auto", "triton", "torch"))
    parser.add_argument("--attention", default="auto", choices=("auto", *ATTENTION))
    parser.add_argument("--memory", action="store_true", help="on a CPU: peaks, in fresh processes")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="begin nothing after it")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but PyTorch finds none: leave it out, for the CPU")
    if {"blocks", "model"} <= set(options.compile):
        raise ConfigError("--compile has blocks and model: take one of them, beside none")
    for tokens in options.tokens:
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            raise ConfigError(f"--tokens has {tokens}, expected squares such as 256")
    for step in options.steps:
        if step not in ("training", "sampling"):
            raise ConfigError(f"--steps has {step!r}, expected training or sampling")
    if options.rounds is not None and options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}, expected 1 or more")
    options.size = options.size or ("XL/1" if on_cuda else "B/1")
    options.dtype = options.dtype or ("bf16" if on_cuda else "fp32")
    options.rounds = options.rounds or (20 if on_cuda else 5)
    options.batch_tokens = options.batch_tokens or (16384 if on_cuda else 4096)
    options.models = options.models or [name for name in MODELS if on_cuda or name not in VARIANTS]
    return options


def main() -> None:
    options = parse()
    device, bf16, shape = options.device, options.dtype == "bf16", Shape.of(options.size)
    deadline = time.monotonic() + options.budget_seconds
    sides = [math.isqrt(tokens) for tokens in options.tokens]
    adds = {side: {n: multiply_adds(n, shape, side) for n in {"iwin", *options.models}} for side in sides}
    keep_freed_memory()
    rate = matmul_rate(DTYPES[options.dtype], device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    say(f"{options.size}, {options.dtype}; matrix multiplication: {rate / 1e12:.3g} T operations/s\n")
    say("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # fresh processes give back what is freed
    clock = Clock(options.rounds, options.kernels, options.attention, deadline)
    scope = next((s for s in options.compile if s != "none"), "none")
    attention = contextlib.nullcontext()
    if options.attention != "auto":
        attention = sdpa_kernel(ATTENTION[options.attention])
    variants = [(name, compiled) for compiled in options.compile for name in options.models]
    total = len(sides) * len(options.steps) * len(variants) * (1 + options.rounds)
    with attention, progress(total=total, unit="time") as bar:
        for side in sides:
            batch = max(1, options.batch_tokens // side**2)
            for step in options.steps:
                case = Case(shape, side, batch, step == "training", device, bf16)
                rows = [Times(*variant, why_not=unavailable(variant[0], device)) for variant in variants]
                bar.set_description(f"{side**2} tokens, {step}")
                present = [row.name for row in rows if row.why_not is None]
                models = Roster(case, present, scope)
                clock.measure(models, rows, bar)
                del models
                torch.compiler.reset()  # compiled code of one case after another, within dynamo's limit
                free_memory()
                for row in rows:
                    if options.memory and device == "cpu" and row.why_not is None:
                        with multiprocessing.get_context("spawn").Pool(1) as fresh:
                            row.peak_bytes = fresh.apply(peak_in_a_fresh_process, (case, row.name))
                    say(f"| {' | '.join(cells(row, rows, adds[side], case, rate))} |")


if __name__ == "__main__":
    run_script(main)
