"""The training loop, told from top to bottom.

The model, the objective and the data come as arguments; Accelerate does devices, processes, autocast and
collectives; the bytes on disk are :mod:`iwin_dit.runtime`'s. State is the step counter, the weights, the EMA
and the optimiser: all randomness is a function of (seed, step), so "run the same command again" resumes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from iwin_dit.runtime.errors import NonFiniteError, UserError, storage_error
from iwin_dit.runtime.processes import shared, together
from iwin_dit.runtime.progress import progress, say
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.runtime.workers import worker_errors
from iwin_dit.training.ema import decay_rules, update_ema
from iwin_dit.training.health import watch_blocks, weight_rms
from iwin_dit.training.optimizer import learning_rate
from iwin_dit.training.replicas import check_weights
from iwin_dit.training.reports import CAUSES, Alarm, Meter, Reports, is_spike
from iwin_dit.training.sharding import full
from iwin_dit.training.state import (
    Progress,
    State,
    full_ema,
    resume,
    save,
    save_snapshot,
)

MAX_ROLLBACKS = 3  # to the same checkpoint


@worker_errors()
def train(
    config: Any,
    accelerator: Accelerator,
    run: RunDirectory | None,
    state: State,
    loss: Callable[..., Tensor],
    loader: Callable[[int], DataLoader],
    micro_batches: int,
    preview: Callable[[dict[str, Tensor], int, StopRequest], None],
    evaluate: Callable[[int, StopRequest], dict[str, float] | None] | None,
    flops_per_image: float,
) -> int:
    """Trains from the newest checkpoint, or from the beginning, to ``config.train.max_steps``.

    Args:
        config: a :class:`~iwin_dit.config.schema.Config`, or anything with its ``train``, ``optimizer`` and
            ``ema``.
        accelerator: with the run's precision.
        run: the run directory, on the main process only.
        state: on the accelerator's device.
        loss: ``loss(model, *batch) -> (B,)``, of a micro-batch on the device.
        loader: ``loader(step)`` yields this process's micro-batches from that step on, as tuples of tensors.
        micro_batches: how many of them make a step.
        preview: ``preview(ema, step, stop)`` draws samples with these weights, on the main process.
        evaluate: ``evaluate(step, stop)`` gives figures of the EMA, by all processes together; none of them
            where there is nothing to say yet, and None where it was stopped: then training stops at this
            step, and the resumed run asks again. Only needed with ``evaluate_every_steps``.
        flops_per_image: of a training step on one image, for the log.

    Returns:
        the step that was reached; less than ``max_steps`` after a signal.

    Raises:
        UserError: where the data or the storage fail, after a checkpoint where there can be one; where the
            numbers are not finite, or the processes disagree.
    """
    options, optim = config.train, config.optimizer
    stop = StopRequest()
    step, offset = resume(accelerator, run, state)
    saved, losses, rollbacks = step, logged(accelerator, run, "loss"), []
    evaluated = set(logged(accelerator, run, "evaluated"))
    model = prepare(accelerator, state.model)
    decays = decay_rules(config.ema.decays, config.ema.power_stds)
    max_norm = optim.max_grad_norm or math.inf  # the norm is measured in any case
    skip = options.max_skipped_steps if options.on_nonfinite == "skip" else 0
    reports, meter = Reports(accelerator), Meter(accelerator, options.batch_images, flops_per_image, skip)
    batches = iter(loader(step + offset))
    alarm, overdue = Alarm(options.save_every_minutes if accelerator.is_main_process else 0), False

    def save_now() -> None:
        nonlocal saved
        if options.compare_weights_every_steps:
            check_weights(accelerator, state, step)
        save(accelerator, run, Progress(step, offset), state, options.keep_checkpoints)
        saved = step
        alarm.set()

    @contextlib.contextmanager
    def saved_first(what: str, of_all: bool = True) -> Iterator[None]:
        """Where data or storage fail, a checkpoint comes before the error.

        Unless the error is ``of_all`` processes, one that is not alone cannot save: it would wait for others.
        """
        try:
            with worker_errors():
                yield
        except (OSError, UserError) as error:
            if step > saved and (of_all or accelerator.num_processes == 1):
                for report in reports.flush():
                    meter.add(report)
                save_now()
            if isinstance(error, OSError):
                raise storage_error(error, "run the same command again", what) from error
            raise

    def evaluate_once() -> bool:
        """Whether training goes on: not where a signal stopped the evaluation."""
        if step in evaluated or not options.evaluate_every_steps:
            return True
        with meter.paused(), saved_first("the evaluation stopped", of_all=False):
            figures = evaluate(step, stop)
        if figures:
            evaluated.add(step)
            with saved_first("the log cannot be written"):
                write_log(accelerator, run, {"step": step, "evaluated": step} | figures)
        return figures is not None

    with progress(
        total=options.max_steps,
        initial=step,
        unit="step",
        desc="train",
        disable=run is None or step >= options.max_steps,
    ) as bar:
        goes_on = True
        if due(step, options.evaluate_every_steps):
            goes_on = evaluate_once()  # of what the run begins with; or it was stopped in the middle of it
        while goes_on and step < options.max_steps:
            rate = learning_rate(step, optim, options.max_steps)
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)

            examined = due(step + 1, options.health_every_steps)
            mean = torch.zeros((), device=accelerator.device)
            with watch_blocks(state.model, examined) as health:
                for micro in range(micro_batches):
                    seed_dropout(config.seed, step + offset, accelerator.process_index, micro)
                    with saved_first("the data cannot be read", of_all=False):
                        read = next(batches)
                    batch = (tensor.to(accelerator.device, non_blocking=True) for tensor in read)
                    with synchronize(accelerator, state.model, model, now=micro == micro_batches - 1):
                        per_image = loss(model, *batch)  # (B,)
                        share = per_image.sum() / options.batch_images  # of the mean over the global batch
                        accelerator.backward(share * accelerator.num_processes)  # gradients are averaged
                    mean += share.detach()
            norm = full(nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)).detach()
            numbers = reports.combine(mean, norm, bool(stop), bool(alarm))
            state.optimizer.found_inf = numbers[2]  # a step that is not finite changes nothing
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            step += 1
            for name, average in state.emas.items():
                update_ema(average, state.model, decays[name](step))
            bar.update()

            last = step == options.max_steps
            logs = last or due(step, options.log_every_steps)
            samples = options.sample_every_steps > 0 and (last or due(step, options.sample_every_steps))
            snapshots = due(step, config.ema.snapshot_every_steps)
            arrived = reports.post(step, numbers)
            saves = due(step, options.save_every_steps) or any(report.save for report in arrived)
            if logs or saves or samples or snapshots:
                arrived += reports.flush()
            overdue = overdue or any(report.save for report in arrived)
            # a checkpoint to which a spike goes back comes with a line of the log
            saves = due(step, options.save_every_steps) or (overdue and (logs or not options.spike_factor))
            for report in arrived:
                meter.add(report)

            if logs:
                record = meter.record(step, rate)
                if examined:
                    record |= {key: value.tolist() for key, value in health.items()}
                    record["weight_rms"] = weight_rms(state.model).tolist()
                with saved_first("the log cannot be written"):
                    write_log(accelerator, run, record)
                bar.set_postfix(
                    loss=record["loss"], images_s=round(record["images_per_second"]), refresh=False
                )
                if saved and is_spike(record["loss"], losses, options.spike_factor):
                    with meter.paused():
                        step, offset = roll_back(accelerator, run, state, Progress(step, offset), rollbacks)
                        losses = logged(accelerator, run, "loss")
                        evaluated.intersection_update(logged(accelerator, run, "evaluated"))
                        batches = iter(loader(step + offset))
                    bar.update(step - bar.n)
                    continue
                losses.append(record["loss"])
            if any(report.stop for report in arrived):
                break
            with meter.paused():
                if due(step, options.compare_weights_every_steps):
                    check_weights(accelerator, state, step)
                if saves and not last:
                    save_now()
                    overdue = False
                if snapshots:
                    with saved_first("the averages cannot be kept"):
                        save_snapshot(accelerator, run, step, state)
                if samples:
                    with saved_first("the samples cannot be written"):
                        together(accelerator, partial(preview, full_ema(state), step, stop))
            if due(step, options.evaluate_every_steps) and not last:
                goes_on = evaluate_once()
    save_now()
    if step >= options.max_steps:
        evaluate_once()
    return step


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


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


def synchronize(accelerator: Accelerator, model: nn.Module, prepared: Any, now: bool) -> Any:
    """The context in which a backward pass averages gradients over the processes, or leaves it for later.

    A split model never leaves it: until then its gradients would be whole on every process.
    """
    leaves = not now and not isinstance(model, FSDPModule)
    return accelerator.no_sync(prepared) if leaves else contextlib.nullcontext()


def write_log(accelerator: Accelerator, run: RunDirectory | None, record: dict[str, Any]) -> None:
    """A line of log.jsonl, and the same numbers for the trackers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}

    def write() -> None:
        run.log(record)
        accelerator.log(numbers, step=record["step"])

    together(accelerator, write)


def logged(accelerator: Accelerator, run: RunDirectory | None, key: str) -> list[Any]:
    """What the lines of the log that have this key say so far, on every process."""

    def read() -> list[Any]:
        return [record[key] for record in run.read_log() if key in record]

    return shared(accelerator, together(accelerator, read))


def roll_back(
    accelerator: Accelerator, run: RunDirectory | None, state: State, at: Progress, rollbacks: list[int]
) -> Progress:
    """Goes back to the newest checkpoint, and on with the data that would have come next.

    Raises:
        NonFiniteError: where that has not helped several times.
    """
    step, _ = resume(accelerator, run, state)
    if rollbacks.count(step) == MAX_ROLLBACKS:
        raise NonFiniteError(
            f"the loss at step {at.step} is still above train.spike_factor times the recent median, after "
            f"{MAX_ROLLBACKS} times going back to step {step}; {CAUSES}"
        )
    rollbacks.append(step)
    if accelerator.is_main_process:
        say(f"loss spike at step {at.step}: back to step {step}, and on with other data")
    return Progress(step, at.data_offset + at.step - step)
