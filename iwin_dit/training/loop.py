"""The training loop, told from top to bottom.

The model, the objective and the data come as a task; Accelerate does devices, processes, autocast and
collectives; the bytes on disk are :mod:`iwin_dit.runtime`'s. State is the step counter, the weights, the EMA
and the optimiser: all randomness is a function of (seed, step), so "run the same command again" resumes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from iwin_dit.runtime.processes import together, worker_errors
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.checkpoints import Checkpoints, Spikes
from iwin_dit.training.ema import decay_rules, update_ema
from iwin_dit.training.optimizer import learning_rate, step_if_finite
from iwin_dit.training.replicas import check_weights
from iwin_dit.training.reports import Meter, Reports, due, watch_blocks, weight_rms
from iwin_dit.training.sharding import full
from iwin_dit.training.state import Progress, Run, Task, full_ema, logged, resume, save_snapshot, write_log


@worker_errors()
def train(
    run: Run, task: Task, loader: Callable[[int], DataLoader], micro_batches: int, stop: StopRequest
) -> int:
    """Trains from the newest checkpoint, or from the beginning, to ``train.max_steps``.

    Args:
        run: the recipe, the processes, the run directory and the state.
        task: what is trained.
        loader: ``loader(step)`` yields this process's micro-batches from that step on, as tuples of tensors.
        micro_batches: how many of them make a step.
        stop: asks to stop at a step.

    Returns:
        the step that was reached; less than ``max_steps`` after a signal.

    Raises:
        UserError: where the data or the storage fail, after a checkpoint where there can be one; where the
            numbers are not finite, or the processes disagree.
    """
    config, accelerator, state = run.config, run.accelerator, run.state
    options = config.train
    at = resume(run)
    spikes = Spikes(run)
    model = prepare(accelerator, state.model)
    decays = decay_rules(config.ema.decays, config.ema.power_stds)
    max_norm = config.optimizer.max_grad_norm or math.inf  # the norm is measured in any case
    skip = options.max_skipped_steps if options.on_nonfinite == "skip" else 0
    reports = Reports(accelerator)
    meter = Meter(accelerator, options.batch_images, task.flops_per_image, skip)
    checkpoints = Checkpoints(run, at.step, reports, meter)
    batches = iter(loader(at.data_step))

    with progress(
        total=options.max_steps,
        initial=at.step,
        unit="step",
        desc="train",
        disable=run.directory is None or at.step >= options.max_steps,
    ) as bar:
        # of what it begins with, or one that was stopped
        goes_on = not due(at.step, options.evaluate_every_steps) or evaluate(run, task, at, stop, checkpoints)
        while goes_on and at.step < options.max_steps:
            rate = learning_rate(at.step, config.optimizer, options.max_steps)
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            task.begin_step(state, at.step)

            examined = due(at.step + 1, options.health_every_steps)
            mean = torch.zeros((), device=accelerator.device)
            with watch_blocks(state.model, examined) as health:
                for micro in range(micro_batches):
                    seed_dropout(config.seed, at.data_step, accelerator.process_index, micro)
                    with checkpoints.saved_first(at, "the data cannot be read", of_all=False):
                        read = next(batches)
                    batch = (tensor.to(accelerator.device, non_blocking=True) for tensor in read)
                    with synchronize(accelerator, state.model, model, now=micro == micro_batches - 1):
                        per_image = task.loss(model, *batch)  # (B,)
                        share = per_image.sum() / options.batch_images  # of the mean over the global batch
                        accelerator.backward(share * accelerator.num_processes)  # gradients are averaged
                    mean += share.detach()
            norm = full(nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)).detach()
            numbers = reports.combine(mean, norm, bool(stop), bool(checkpoints.alarm))
            step_if_finite(state.optimizer, not_finite=numbers[2])
            state.optimizer.zero_grad(set_to_none=True)
            at = Progress(at.step + 1, at.data_offset)
            for name, average in state.emas.items():
                update_ema(average, state.model, decays[name](at.step))
            bar.update()

            last = at.step == options.max_steps
            logs = last or due(at.step, options.log_every_steps)
            samples = options.sample_every_steps > 0 and (last or due(at.step, options.sample_every_steps))
            snapshots = due(at.step, config.ema.snapshot_every_steps)
            arrived = reports.post(at.step, numbers)
            if logs or samples or snapshots or checkpoints.due(at.step, logs, arrived):
                arrived += reports.flush()
            for report in arrived:
                meter.add(report)

            if logs:
                record = meter.record(at.step, rate)
                if examined:
                    record |= {key: value.tolist() for key, value in health.items()}
                    record["weight_rms"] = weight_rms(state.model).tolist()
                with checkpoints.saved_first(at, "the log cannot be written"):
                    write_log(run, record)
                speed = round(record["images_per_second"])
                bar.set_postfix(loss=record["loss"], images_s=speed, refresh=False)
                if spikes.found(record["loss"]) and checkpoints.newest:
                    with meter.paused():
                        at = spikes.roll_back(at)
                        batches = iter(loader(at.data_step))
                    bar.update(at.step - bar.n)
                    continue
            if any(report.stop for report in arrived):
                break
            with meter.paused():
                if due(at.step, options.compare_weights_every_steps):
                    check_weights(accelerator, state, at.step)
                if checkpoints.due(at.step, logs, arrived) and not last:
                    checkpoints.save(at)
                if snapshots:
                    with checkpoints.saved_first(at, "the averages cannot be kept"):
                        save_snapshot(run, at.step)
                if samples:
                    with checkpoints.saved_first(at, "the samples cannot be written"):
                        together(accelerator, partial(task.preview, run, full_ema(state), at.step, stop))
            if due(at.step, options.evaluate_every_steps) and not last:
                goes_on = evaluate(run, task, at, stop, checkpoints)
    checkpoints.save(at)
    if at.step >= options.max_steps and options.evaluate_every_steps:
        evaluate(run, task, at, stop, checkpoints)
    return at.step


def evaluate(run: Run, task: Task, at: Progress, stop: StopRequest, checkpoints: Checkpoints) -> bool:
    """Writes the figures of this step to the log, unless it has them, as after a resume.

    Returns:
        whether training goes on: not where a signal stopped the evaluation.
    """
    with checkpoints.saved_first(at, "the log cannot be read"):
        if at.step in logged(run, "evaluated"):
            return True
    with checkpoints.meter.paused(), checkpoints.saved_first(at, "the evaluation stopped", of_all=False):
        figures = task.evaluate(run, at.step, stop)
    if figures:
        with checkpoints.saved_first(at, "the log cannot be written"):
            write_log(run, {"step": at.step, "evaluated": at.step} | dict(figures))
    return figures is not None


def seed_dropout(seed: int, step: int, process: int, micro: int) -> None:
    """The global generators, from which only dropout and stochastic depth draw."""
    torch.manual_seed(derive_seed(seed, "dropout", step, process, micro))


def prepare(accelerator: Accelerator, model: nn.Module) -> Callable[..., Any]:
    """What the objective calls: with autocast, and averaging gradients over the processes."""
    model.train()
    if not isinstance(model, FSDPModule):
        return accelerator.prepare_model(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return model(*args, **kwargs)

    return call


def synchronize(
    accelerator: Accelerator, model: nn.Module, prepared: Callable[..., Any], now: bool
) -> contextlib.AbstractContextManager:
    """The context in which a backward pass averages gradients over the processes, or leaves it for later.

    A split model never leaves it: until then its gradients would be whole on every process.
    """
    leaves = not now and not isinstance(model, FSDPModule)
    return accelerator.no_sync(prepared) if leaves else contextlib.nullcontext()
