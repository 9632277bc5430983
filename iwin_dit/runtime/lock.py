"""A lock on a folder: one process at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.progress import say

POLL_SECONDS = 0.2
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without locks answer


def hold(folder: Path, wait: bool = False) -> TextIO:
    """Keeps a folder for this process until the returned file is closed or the process ends.

    The lock belongs to the process: its children do not inherit it, so that data workers which outlive a
    killed process by seconds do not hold it.

    Args:
        folder: a folder that exists; the lock is its file ``lock``.
        wait: with False, a folder in use is refused, as an output folder has to be. With True, this process
            says once whom it waits for, and waits: so several can share a cache, or data that one prepares.

    Raises:
        ConfigError: where another process holds it and ``wait`` is False.
        OSError: where it cannot be written.
    """
    lock = open(folder / "lock", "a+")  # noqa: SIM115
    waited = False
    while not _try(lock):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        if not wait:
            lock.close()
            raise ConfigError(f"{folder} is in use, held by {holder}; wait, or take another")
        if not waited:
            say(f"waiting for {folder}, held by {holder}")
            waited = True
        time.sleep(POLL_SECONDS)
    lock.seek(0)
    lock.truncate()
    lock.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
    lock.flush()
    return lock


def _try(lock: TextIO) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # systems differ in what they answer
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise ConfigError(
            f"{Path(lock.name).parent} cannot be locked ({error.strerror}), so that two processes could "
            "write there at once: mount it with locks (Lustre: the option flock), or take another folder"
        ) from error
    return True
