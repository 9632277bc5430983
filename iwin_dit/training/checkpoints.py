"""When a run saves, by steps or the clock, at the end and before an error, and goes back after a spike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from statistics import median

from iwin_dit.runtime.errors import NonFiniteError, UserError, storage_error
from iwin_dit.runtime.processes import worker_errors
from iwin_dit.runtime.progress import say
from iwin_dit.training.replicas import check_weights
from iwin_dit.training.reports import CAUSES, Alarm, Meter, Report, Reports, due
from iwin_dit.training.state import Progress, Run, logged, resume, save

MAX_ROLLBACKS = 3  # to the same checkpoint


class Checkpoints:
    """The checkpoints of a run.

    Args:
        newest: the step of the newest one; 0 for none.
        reports: of steps; all of them are read, and counted by ``meter``, before a checkpoint is written.
    """

    def __init__(self, run: Run, newest: int, reports: Reports, meter: Meter):
        self.run, self.newest, self.reports, self.meter = run, newest, reports, meter
        self.alarm = Alarm(run.config.train.save_every_minutes if run.accelerator.is_main_process else 0)

    def due(self, step: int, logs: bool, arrived: Sequence[Report]) -> bool:
        """Whether one comes now, by the number of steps or because the clock of a report asks for it.

        Args:
            logs: whether a line of the log comes now. A checkpoint to which a spike goes back waits for one.
            arrived: the reports of this step.
        """
        options = self.run.config.train
        asked = any(report.save for report in arrived)  # the clock goes on asking until there is one
        return due(step, options.save_every_steps) or (asked and (logs or not options.spike_factor))

    def save(self, at: Progress) -> None:
        """Writes one, of weights that the processes agree on."""
        if self.run.config.train.compare_weights_every_steps:
            check_weights(self.run.accelerator, self.run.state, at.step)
        save(self.run, at)
        self.newest = at.step
        self.alarm.set()

    @contextlib.contextmanager
    def saved_first(self, at: Progress, what: str, of_all: bool = True) -> Iterator[None]:
        """The context of what data or storage may refuse: a checkpoint comes before the error.

        Args:
            what: what could not be done.
            of_all: whether the error is that of all processes. One that is not alone cannot save otherwise:
                it would wait for others.
        """
        try:
            with worker_errors():
                yield
        except (OSError, UserError) as error:
            if at.step > self.newest and (of_all or self.run.accelerator.num_processes == 1):
                for report in self.reports.flush():
                    self.meter.add(report)
                self.save(at)
            if isinstance(error, OSError):
                raise storage_error(error, "run the same command again", what) from error
            raise


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
