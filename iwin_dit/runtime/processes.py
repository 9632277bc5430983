"""Several processes at one task: their cores, how they wait, what one does for all, and when one dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from iwin_dit.runtime.errors import UserError, WorkerError, reason

T = TypeVar("T")

# How long processes wait for each other. The first one lists a million files, prepares data, looks at all
# images or computes figures while the others wait. PyTorch's own 10 minutes (NCCL) or 30 (gloo) are too few.
# This is for one that hangs: of one that dies its launcher knows at once.
WAIT = timedelta(days=1)
TRAINING_WAIT = timedelta(hours=2)  # where it saves, verifies and draws, and a hang costs all devices
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(num_processes: int) -> None:
    """Shares the cores among the processes: ``accelerate launch`` gives each a single thread."""
    torch.set_num_threads(max(1, cores() // num_processes))


def keep_freed_memory() -> None:
    """Keeps freed memory in the process.

    glibc would map and unmap every large tensor, page fault by page fault; without that the quickstart trains
    1.7 times as fast. Where there is no glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What the main process's ``action`` returns, on every process, or its error."""
    return shared(accelerator, together(accelerator, action))


@contextlib.contextmanager
def worker_errors(
    fewer: str = "lower train.num_workers", longer: str = ", or raise train.worker_timeout_seconds"
) -> Iterator[None]:
    """A process that reads data and dies or hangs becomes an error of its own; it may show up anywhere.

    Args:
        fewer: the advice for a process that was killed.
        longer: how to wait longer for a slow disk, if there is a way.

    Raises:
        WorkerError: naming the process.
    """
    killed = f"it was killed, often for memory: {fewer}"
    try:
        yield
    except (ConnectionResetError, ConnectionRefusedError, EOFError) as error:  # while it sent a batch
        with contextlib.suppress(RuntimeError):
            time.sleep(1)  # PyTorch's own error of a worker's death may come a moment later
        raise WorkerError(
            f"a DataLoader worker is gone; {killed}; run the same command again to go on"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker (pid" in text:
            advice = killed
        elif "DataLoader timed out" in text:
            advice = f"the disk hangs, or is too slow: look at it{longer}"
        else:
            raise
        raise WorkerError(f"{reason(error)}; {advice}; run the same command again to go on") from error
