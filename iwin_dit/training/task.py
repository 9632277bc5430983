"""What a run trains: all in which a generator and a classifier differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.optimizer import Groups
from iwin_dit.training.state import Run


class Task(Protocol):
    """What the trunk asks for. B are the examples of a micro-batch."""

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
