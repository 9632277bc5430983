"""Spikes of the loss, and the way back to the checkpoint before one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from iwin_dit.runtime.errors import NonFiniteError
from iwin_dit.runtime.progress import say
from iwin_dit.training.reports import CAUSES
from iwin_dit.training.state import Progress, Run, logged, resume

MAX_ROLLBACKS = 3  # to the same checkpoint


class Spikes:
    """Finds spikes in the losses that are logged, and goes back to the newest checkpoint."""

    def __init__(self, run: Run):
        self.run, self.factor = run, run.config.train.spike_factor
        self.losses: list[float | None] = logged(run, "loss")
        self.rollbacks: list[int] = []

    def found(self, loss: float | None) -> bool:
        """Whether this loss, which has just been logged, is a spike."""
        self.losses.append(loss)
        return is_spike(loss, self.losses[:-1], self.factor)

    def roll_back(self, at: Progress) -> Progress:
        """Goes back to the newest checkpoint, and on with the data that would have come next.

        Raises:
            NonFiniteError: where that has not helped several times.
        """
        step, _ = resume(self.run)
        if self.rollbacks.count(step) == MAX_ROLLBACKS:
            raise NonFiniteError(
                f"the loss at step {at.step} is still above train.spike_factor times the recent median, "
                f"after {MAX_ROLLBACKS} times going back to step {step}; {CAUSES}"
            )
        self.rollbacks.append(step)
        self.losses = logged(self.run, "loss")
        if self.run.accelerator.is_main_process:
            say(f"loss spike at step {at.step}: back to step {step}, and on with other data")
        return Progress(step, at.data_step - step)


def is_spike(loss: float | None, before: Sequence[float | None], factor: float | None) -> bool:
    """Whether a logged loss is above ``factor`` times the median of the 20 before it; at least five."""
    recent = [value for value in before[-20:] if value is not None]
    if factor is None or loss is None or len(recent) < 5:
        return False
    return loss > factor * median(recent)
