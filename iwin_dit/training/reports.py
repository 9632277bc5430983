"""What steps report to the host, without making the device wait, and what is logged of them and of blocks."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iwin_dit.runtime.errors import NonFiniteError
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.training.sharding import blocks_of, full

# Dense bf16 matrix-multiply peak in FLOP/s, by what the driver calls the card (the vendor's data sheets).
PEAK_FLOPS = {
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


# what to look at where a loss goes wrong
CAUSES = (
    "lower optimizer.learning_rate; latents may be at fault, too: check them with extract_latents.py --verify"
)


class Report(NamedTuple):
    """One step as the host knows it: means over the global batch; whether any process was asked to stop.

    save: whether the main process asks for a checkpoint.
    """

    step: int
    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    save: bool = False


class Reports:
    """Carries a few numbers per step from all processes to the host.

    On a CPU they are there at once. On a CUDA device they travel while the next step is computed, and are
    read one step later: the device never waits. Meanwhile ``found_inf`` keeps a bad step from changing
    anything.

    Args:
        deferred: read one step later. Default: on CUDA devices.
    """

    def __init__(self, accelerator: Accelerator, deferred: bool | None = None):
        self.accelerator = accelerator
        self.deferred = accelerator.device.type == "cuda" if deferred is None else deferred
        self._waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def combine(self, loss: Tensor, norm: Tensor, stop: bool, save: bool = False) -> Tensor:
        """``[loss, norm, not finite, stop, save]`` on the device, the same on every process.

        Args:
            loss: this process's share of the global mean.
            norm: of the gradient, which is the same on every process.
            stop, save: what this process asks for; that one does is enough.
        """
        sums = torch.stack([loss, *(torch.full_like(loss, float(asked)) for asked in (stop, save))])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        norm = norm.to(sums.dtype)
        bad = ~(torch.isfinite(sums[0]) & torch.isfinite(norm))
        return torch.stack([sums[0], norm, bad.to(sums.dtype), *sums[1:]])

    def post(self, step: int, numbers: Tensor) -> list[Report]:
        """Sends off what :meth:`combine` made; returns what has arrived, oldest first."""
        host = numbers.to("cpu", non_blocking=self.deferred)
        event = None
        if numbers.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, host, event))
        return self._read(keep=int(self.deferred))

    def flush(self) -> list[Report]:
        """All that has not been read yet; the device is waited for."""
        return self._read(keep=0)

    def _read(self, keep: int) -> list[Report]:
        ready = self._waiting[: len(self._waiting) - keep]
        self._waiting = self._waiting[len(ready) :]
        reports = []
        for step, host, event in ready:
            if event is not None:
                event.synchronize()
            loss, norm, bad, stop, save = host.tolist()
            reports.append(Report(step, loss, norm, bad == 0, stop > 0, save > 0))
        return reports


class Alarm:
    """Truthy once so many minutes have passed since it was set. Nothing else in training asks for the time.

    Args:
        minutes: 0 for never.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes or math.inf
        self.set()

    def set(self) -> None:
        """Begins to wait anew."""
        self._began = time.monotonic()

    def __bool__(self) -> bool:
        return time.monotonic() - self._began >= self.seconds


class Meter:
    """From the reports of steps to the lines of the log; stops a run that has diverged.

    Args:
        batch_images: images of a step, over all processes.
        flops_per_image: of a training step on one image.
        max_skipped: so many bad steps in a row are skipped; 0 to stop at the first.
    """

    def __init__(self, accelerator: Accelerator, batch_images: int, flops_per_image: float, max_skipped: int):
        self.batch_images, self.max_skipped = batch_images, max_skipped
        self.flops = batch_images * flops_per_image / accelerator.num_processes
        self.peak = peak_flops(accelerator.device)
        self.skipped = self._in_a_row = 0
        self.restart()

    def restart(self) -> None:
        """Begins a line of the log anew."""
        self._losses: list[float] = []
        self._norm = math.nan
        self._steps, self._paused, self._started = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The context of what is not training: its time does not count."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def add(self, report: Report) -> None:
        """Counts one step.

        Raises:
            NonFiniteError: where it was not finite, and no more may be skipped.
        """
        self._steps += 1
        self._norm = report.grad_norm
        if report.finite:
            self._losses.append(report.loss)
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self.max_skipped:
            more = f", {self._in_a_row} steps in a row" if self.max_skipped else ""
            raise NonFiniteError(
                f"training diverged at step {report.step}: loss {report.loss}, gradient norm "
                f"{report.grad_norm}{more}; the step was not taken; {CAUSES}"
            )

    def record(self, step: int, rate: float) -> dict[str, Any]:
        """The line of the log since the last one."""
        seconds = time.perf_counter() - self._started - self._paused
        flops = self.flops * self._steps / seconds
        record = {
            "step": step,
            "loss": sum(self._losses) / len(self._losses) if self._losses else None,
            "grad_norm": self._norm if math.isfinite(self._norm) else None,
            "learning_rate": rate,
            "images_per_second": round(self._steps * self.batch_images / seconds, 1),
            "tflops_per_device": float(f"{flops / 1e12:.3g}"),
        }
        if self.peak is not None:
            record["mfu"] = round(flops / self.peak, 4)
        if self.skipped:
            record["skipped_steps"] = self.skipped
        self.restart()
        return record


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def peak_flops(device: torch.device) -> float | None:
    """Of a card that is known here, a whole one; else None, and no MFU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "MIG" in name or "Laptop" in name:
        return None
    return next((peak for card, peak in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), None)


def draw_loss_curve(run: RunDirectory) -> Path | None:
    """``loss.png`` from the log, figures of evaluations beside it; None, and a hint, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        say("no loss curve: it needs matplotlib, pip install 'iwin-dit[demo]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = run.read_log()
    logged = [r for r in records if r.get("loss") is not None]
    figures = [r for r in records if "evaluated" in r]
    names = [name for name in (figures[-1] if figures else {}) if name not in ("step", "evaluated")]
    figure, axes = plt.subplots(
        1, 1 + len(names), figsize=(7 + 4 * len(names), 4), layout="constrained", squeeze=False
    )
    steps, losses = [r["step"] for r in logged], [r["loss"] for r in logged]
    running = [fmean(losses[max(0, i - 5) : i + 6]) for i in range(len(losses))]
    axes[0, 0].plot(steps, losses, color="0.8", label="each log line")
    axes[0, 0].plot(steps, running, color="tab:blue", label="running mean")
    axes[0, 0].set(xlabel="step", ylabel="loss", title=run.path.name)
    axes[0, 0].legend(frameon=False)
    for panel, name in zip(axes[0, 1:], names, strict=True):
        shown = [r for r in figures if name in r]
        panel.plot([r["step"] for r in shown], [r[name] for r in shown], marker="o", color="tab:blue")
        panel.set(xlabel="step", title=name)
    path = run.path / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


@contextmanager
def watch_blocks(model: nn.Module, active: bool) -> Iterator[dict[str, Tensor]]:
    """Fills the dictionary that it yields with ``activation_rms``, ``(blocks,)``, during forward passes.

    The root mean square of each block's output on this process, of the last micro-batch. Where not
    ``active``, nothing is measured and nothing costs.
    """
    found: dict[str, Tensor] = {}
    if not active:
        yield found
        return
    blocks = blocks_of(model)
    values: dict[int, Tensor] = {}

    def measure(i: int, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        output = output if isinstance(output, Tensor) else output[0]  # the first may return its values, too
        values[i] = output.detach().float().square().mean().sqrt()

    handles = [block.register_forward_hook(partial(measure, i)) for i, block in enumerate(blocks)]
    try:
        yield found
        found["activation_rms"] = torch.stack([values[i] for i in range(len(blocks))])
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weight_rms(model: nn.Module) -> Tensor:
    """The root mean square of each block's parameters: ``(blocks,)``. All processes together."""
    rms = []
    for block in blocks_of(model):
        squares = [full(parameter.square().sum()) for parameter in block.parameters()]
        rms.append((torch.stack(squares).sum() / sum(p.numel() for p in block.parameters())).sqrt())
    return torch.stack(rms)
