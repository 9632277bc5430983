"""What a run trains, its state and its log, and their way to disk and back on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import Dataset

from iwin_dit.config.classifier import Recipe
from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import CheckpointError
from iwin_dit.runtime.processes import shared, together
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.optimizer import Groups, named_state
from iwin_dit.training.sharding import assign, full


class State(NamedTuple):
    """The plain model (perhaps split over the processes), its averages by name, and the optimiser."""

    model: nn.Module
    emas: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The files of a checkpoint: ``{file: {name: tensor}}``, by reference."""
        emas = {name: ema.state_dict() for name, ema in self.emas.items()}
        optimizer = named_state(self.optimizer, self.model)
        return {"model": self.model.state_dict(), **emas, "optimizer": optimizer}


class Run(NamedTuple):
    """What trains: a recipe, the processes, the run directory, and the state on the accelerator's device.

    The main process alone holds the directory, and asks for it as ``run.files``.
    """

    config: Recipe
    accelerator: Accelerator
    directory: RunDirectory | None
    state: State

    @property
    def files(self) -> RunDirectory:
        """The run directory, which the main process may ask for."""
        assert self.directory is not None, "only the main process holds the run directory"
        return self.directory


class Progress(NamedTuple):
    """Where a run stands: the step, and by how many steps its data are ahead of it after roll-backs."""

    step: int = 0
    data_offset: int = 0

    @property
    def data_step(self) -> int:
        """The step of the data that comes next."""
        return self.step + self.data_offset


def save(run: Run, at: Progress) -> None:
    """A checkpoint, written by the main process while the others wait; its failure is everybody's."""
    tensors, keep = gather(run.accelerator, run.state.groups()), run.config.train.keep_checkpoints
    written = at.step, tensors, {"data_offset": at.data_offset}, keep
    together(run.accelerator, lambda: checkpoint.save_checkpoint(run.files.checkpoints, *written))


def save_snapshot(run: Run, step: int) -> None:
    """The power-function averages of this step, kept for post-hoc reconstruction."""
    powers = {name: ema.state_dict() for name, ema in run.state.emas.items() if name.startswith("ema_std_")}
    tensors = gather(run.accelerator, powers)
    together(
        run.accelerator, lambda: checkpoint.save_checkpoint(run.files.snapshots, step, tensors, {}, keep=None)
    )


def resume(run: Run) -> Progress:
    """Loads the newest checkpoint on the main process, then on all others; nothing where there is none.

    Raises:
        CheckpointError: where it is damaged or does not fit, on every process.
    """
    accelerator, groups = run.accelerator, run.state.groups()

    def read() -> tuple[Progress, dict[str, dict[str, Tensor]]]:
        newest = checkpoint.newest(run.files.checkpoints)
        if newest is None:
            run.files.begin(0)
            return Progress(), {}
        tensors = {name: checkpoint.read_tensors(newest, name, like=groups[name]) for name in groups}
        found = checkpoint.read_state(newest)
        offset = found.get("data_offset", 0)
        if type(offset) is not int or offset < 0:
            raise CheckpointError(f"{newest} has data_offset {offset!r}, expected a number of steps")
        run.files.begin(found["step"])
        return Progress(found["step"], offset), tensors

    progress, tensors = together(accelerator, read) or (Progress(), {})
    progress = shared(accelerator, progress)
    if progress.step:
        for name, group in groups.items():
            spread(accelerator, tensors.get(name), group)
    return progress


@torch.no_grad()
def spread(accelerator: Accelerator, values: dict[str, Tensor] | None, into: dict[str, Tensor]) -> None:
    """Copies the main process's whole tensors into everybody's, split or not."""
    for name, target in into.items():
        if values is not None:
            value = values[name].to(accelerator.device)
        else:
            value = torch.empty(target.shape, dtype=target.dtype, device=accelerator.device)
        assign(target, broadcast(value) if accelerator.num_processes > 1 else value)


@torch.no_grad()
def gather(accelerator: Accelerator, groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Whole tensors, for the main process to write; the others help, and keep nothing."""
    gathered: dict[str, dict[str, Tensor]] = {}
    for group, tensors in groups.items():
        gathered[group] = {}
        for name, tensor in tensors.items():
            whole = full(tensor)
            if accelerator.is_main_process:
                gathered[group][name] = whole if whole is tensor else whole.cpu()
    return gathered


def full_ema(state: State) -> dict[str, Tensor]:
    """The average that sampling uses, as whole tensors; all processes together."""
    return {name: full(tensor) for name, tensor in state.emas["ema"].state_dict().items()}


def write_log(run: Run, record: dict[str, Any]) -> None:
    """A line of log.jsonl, and the same numbers for the trackers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}

    def write() -> None:
        run.files.log(record)
        run.accelerator.log(numbers, step=record["step"])

    together(run.accelerator, write)


def logged(run: Run, key: str) -> list[Any]:
    """What the lines of the log that have this key say so far, on every process."""
    found = together(run.accelerator, lambda: [r[key] for r in run.files.read_log() if key in r])
    return shared(run.accelerator, found)


class Task(Protocol):
    """All in which a generator and a classifier differ. B are the examples of a micro-batch."""

    @property
    def model(self) -> nn.Module:
        """The network as it begins."""

    @property
    def examples(self) -> Dataset:
        """What training sees at each position of its stream."""

    @property
    def in_pairs(self) -> bool:
        """Whether images are mixed two by two, so that a micro-batch holds whole pairs."""

    @property
    def flops_per_image(self) -> float:
        """Floating-point operations of a training step on one image."""

    @property
    def loss(self) -> Callable[..., Tensor]:
        """``loss(model, *batch) -> (B,)``, of a micro-batch on the device.

        The model is called as the network is; it averages gradients over the processes.
        """

    def begin_step(self, state: State, step: int) -> None:
        """Hears of the state and the number of steps so far, before each step and before a trial."""

    def parameter_groups(self) -> Groups:
        """The parameters of the model as an optimiser takes them."""

    def random_batch(self, images: int) -> Sequence[Tensor]:
        """A micro-batch of random numbers, to try how many images fit into memory."""

    def preview(self, run: Run, ema: dict[str, Tensor], step: int, stop: StopRequest) -> None:
        """Draws what the weights of the EMA do, on the main process."""

    def evaluate(self, run: Run, step: int, stop: StopRequest) -> Mapping[str, float] | None:
        """Figures of the EMA, by all processes together; none of them where there is nothing to say yet.

        None where it was stopped: then training stops at this step, and the resumed run asks again.
        """

    def finish(self, run: Run, ema: dict[str, Tensor], step: int) -> str:
        """Writes the trained network for use elsewhere, on the main process; returns what to say."""
