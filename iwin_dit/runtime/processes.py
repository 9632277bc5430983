"""Several processes at one task: how long they wait for each other, and what one does for all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from iwin_dit.runtime.errors import UserError

T = TypeVar("T")

# How long processes wait for each other. The first one lists a million files, prepares data, looks at all
# images or computes figures while the others wait. PyTorch's own 10 minutes (NCCL) or 30 (gloo) are too few.
# This is for one that hangs: of one that dies its launcher knows at once.
WAIT = timedelta(days=1)
TRAINING_WAIT = timedelta(hours=2)  # where it saves, verifies and draws, and a hang costs all devices


def group_timeout(wait: timedelta = WAIT) -> InitProcessGroupKwargs:
    """What an :class:`accelerate.Accelerator` takes, in every program of ours."""
    return InitProcessGroupKwargs(timeout=wait)


def together(accelerator: Accelerator, action: Callable[[], T]) -> T | None:
    """Runs ``action`` on the main process while the others wait. Its error is raised on every process.

    Returns:
        what ``action`` returned, on the main process; None on the others.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except Exception as error:
            failure = error
    if accelerator.num_processes > 1:  # the text alone: an error may hold what cannot be sent
        told = None
        if failure is not None:
            told = type(failure), str(failure), getattr(failure, "errno", None)
        sent = shared(accelerator, told)
        if sent is not None and failure is None:
            kind, text, number = sent
            if issubclass(kind, OSError):
                raise OSError(number, f"on the main process: {text}")
            known = kind if issubclass(kind, UserError) else RuntimeError
            raise known(f"on the main process: {text}")
    if failure is not None:
        raise failure
    return result


def shared(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value
