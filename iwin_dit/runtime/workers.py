"""Processes that read data: what it means when one dies or hangs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from iwin_dit.runtime.errors import WorkerError, reason


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
