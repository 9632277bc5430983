"""The log of a run: lines that the main process writes, and that all processes read."""

from __future__ import annotations

from typing import Any

from iwin_dit.runtime.processes import shared, together
from iwin_dit.training.state import Run


def write_log(run: Run, record: dict[str, Any]) -> None:
    """A line of log.jsonl, and the same numbers for the trackers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}

    def write() -> None:
        run.files.log(record)
        run.accelerator.log(numbers, step=record["step"])

    together(run.accelerator, write)


def logged(run: Run, key: str) -> list[Any]:
    """What the lines of the log that have this key say so far, on every process."""

    def read() -> list[Any]:
        return [record[key] for record in run.files.read_log() if key in record]

    return shared(run.accelerator, together(run.accelerator, read))
