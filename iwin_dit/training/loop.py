"""The training loop, told from top to bottom.

The model, the objective and the data come as arguments; Accelerate does devices, processes, autocast and
collectives; the bytes on disk are :mod:`iwin_dit.runtime`'s. State is the step counter, the weights, the EMA
and the optimiser: all randomness is a function of (seed, step), so "run the same command again" resumes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import NonFiniteError
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.ema import update_ema
from iwin_dit.training.optimizer import learning_rate, load_named_state, named_state


class State(NamedTuple):
    """What a checkpoint holds beside the step: the plain model, its average, and the optimiser."""

    model: nn.Module
    ema: nn.Module
    optimizer: Any


def train(
    config: Any,
    accelerator: Accelerator,
    run: RunDirectory | None,
    state: State,
    objective: Any,
    encode: Callable[[Tensor], Tensor],
    loader: Callable[[int], DataLoader],
    micro_batches: int,
    preview: Callable[[nn.Module, int], None],
) -> int:
    """Trains from the newest checkpoint, or from the beginning, to ``config.train.max_steps``.

    Args:
        config: a :class:`~iwin_dit.config.Config`.
        accelerator: with the run's precision.
        run: the run directory, on the main process only.
        state: on the accelerator's device.
        objective: ``objective.loss(model, x0, labels, noise, u) -> (B,)``.
        encode: from what the loader gives, on the device, to normalised latents ``(B, C, h, w)``.
        loader: ``loader(step)`` yields this process's micro-batches from that step on.
        micro_batches: how many of them make a step.
        preview: ``preview(ema, step)`` draws samples, on the main process.

    Returns:
        the step that was reached; less than ``max_steps`` after SIGTERM or Ctrl-C.
    """
    options, optim = config.train, config.optimizer
    step = resume(accelerator, run, state)
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    model.train()
    batches = iter(loader(step))
    stop, meter = StopRequest(), Meter(accelerator)
    with progress(
        total=options.max_steps,
        initial=step,
        unit="step",
        desc="train",
        disable=not accelerator.is_main_process or step >= options.max_steps,
    ) as bar:
        while step < options.max_steps:
            rate = learning_rate(step, optim.learning_rate, optim.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate

            for micro in range(micro_batches):
                x0, labels, noise, u = (
                    tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches)
                )
                last = micro == micro_batches - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    losses = objective.loss(model, encode(x0), labels, noise, u)  # (B,)
                    # the mean over the global batch: a sum here, which DDP averages over the processes
                    accelerator.backward(losses.sum() * (accelerator.num_processes / options.batch_images))
                meter.add(losses)
            norm = accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_ema(state.ema, state.model, options.ema_decay)
            step += 1
            bar.update()

            done = step == options.max_steps
            if done or step % options.log_every_steps == 0:
                record, stopping = meter.read(step, norm, rate, bool(stop))
                check_finite(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", images_s=f"{record['images_per_second']:.0f}")
                if run is not None:
                    run.log(record)
                if stopping:
                    break
            if not done and step % options.save_every_steps == 0:
                save(accelerator, run, step, state, options.keep_checkpoints)
            if options.sample_every_steps and (done or step % options.sample_every_steps == 0):
                if run is not None:
                    preview(state.ema, step)
                accelerator.wait_for_everyone()
                meter.started = time.perf_counter()  # drawing is not training
    save(accelerator, run, step, state, options.keep_checkpoints)
    return step


def check_finite(record: dict[str, Any]) -> None:
    """Stops a run that has diverged, before its next checkpoint."""
    if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
        raise NonFiniteError(
            f"training diverged at step {record['step']}: loss {record['loss']}, "
            f"gradient norm {record['grad_norm']}; lower optimizer.learning_rate"
        )


def resume(accelerator: Accelerator, run: RunDirectory | None, state: State) -> int:
    """Loads the newest checkpoint on the main process, then on all others. Returns its step, or 0."""
    step = 0
    if run is not None and (newest := checkpoint.newest(run.checkpoints)) is not None:
        for name in ("model", "ema"):
            module = getattr(state, name)
            module.load_state_dict(checkpoint.read_tensors(newest, name, like=module.state_dict()))
        load_named_state(state.optimizer, state.model, checkpoint.read_tensors(newest, "optimizer"))
        step = checkpoint.read_state(newest)["step"]
    if run is not None:
        run.begin(step)
    return share(accelerator, step, state)


def share(accelerator: Accelerator, step: int, state: State) -> int:
    """Gives every process the main process's step, weights, EMA and optimiser."""
    if accelerator.num_processes == 1:
        return step
    (step,) = broadcast_object_list([step])
    for module in (state.model, state.ema):
        for tensor in module.state_dict().values():
            tensor.copy_(broadcast(tensor))
    if step:
        held = {
            key: (value.shape, value.dtype)
            for key, value in named_state(state.optimizer, state.model).items()
        }
        (held,) = broadcast_object_list([held])
        mine = named_state(state.optimizer, state.model)
        tensors = {
            key: broadcast(mine.get(key, torch.empty(shape, dtype=dtype)).to(accelerator.device))
            for key, (shape, dtype) in held.items()
        }
        load_named_state(state.optimizer, state.model, {k: v.cpu() for k, v in tensors.items()})
    return step


def save(accelerator: Accelerator, run: RunDirectory | None, step: int, state: State, keep: int) -> None:
    """A checkpoint, written by the main process while the others wait."""
    if run is not None:
        tensors = {
            "model": state.model.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": named_state(state.optimizer, state.model),
        }
        checkpoint.save_checkpoint(run.checkpoints, step, tensors, {}, keep)
    accelerator.wait_for_everyone()


class Meter:
    """Loss and speed between two log lines, over all processes; sums stay on the device till then."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.total, self.images = torch.zeros((), device=accelerator.device), 0
        self.started = time.perf_counter()

    def add(self, losses: Tensor) -> None:
        self.total += losses.detach().float().sum()
        self.images += len(losses)

    def read(self, step: int, norm: Tensor, rate: float, stop: bool) -> tuple[dict[str, Any], bool]:
        """The log record, and whether any process was asked to stop; then starts anew."""
        sums = torch.stack(
            [self.total, torch.full_like(self.total, self.images), torch.full_like(self.total, stop)]
        )
        total, images, stops = self.accelerator.reduce(sums, reduction="sum").tolist()
        record = {
            "step": step,
            "loss": total / images,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "images_per_second": round(images / (time.perf_counter() - self.started), 1),
        }
        self.total, self.images = torch.zeros_like(self.total), 0
        self.started = time.perf_counter()
        return record, stops > 0
