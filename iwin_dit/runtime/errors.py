"""Errors that a user can mend. Scripts show them as one line and an exit code, without a traceback."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no quota left, over a limit


class UserError(Exception):
    """Says what was found, what was expected and what to do."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A config, an argument or a path that cannot work."""


class CheckpointError(UserError):
    """A checkpoint or pipeline that is missing, damaged or made by something else."""


class DataError(UserError):
    """Images or latents that are missing, damaged or do not fit the model."""


class DiskError(UserError):
    """The disk is full, or takes no more from this process."""

    exit_code = 3


class StorageError(UserError):
    """The storage does not deliver what it holds, or takes nothing: I/O errors, no permission."""

    exit_code = 6


class NonFiniteError(UserError):
    """Training diverged."""

    exit_code = 4


class WorkerError(UserError):
    """A process that reads data died or hangs."""

    exit_code = 5


def _one_line(error: UserError) -> str:
    """An error of a worker process arrives with that process's traceback before its own words."""
    text = str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's ``main`` and ends the process: the user's mistakes as one line, bugs as a traceback."""
    with contextlib.suppress(OSError, RuntimeError):  # where stderr is no file
        faulthandler.enable()  # a crash in a library says where, too
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `| head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        kind, advice = StorageError, "look at its storage and permissions, and run it again"
        if error.errno in FULL:
            kind, advice = DiskError, "make room, and run it again"
        what = f"{error.strerror or error}: {error.filename or 'a file'}"
        print(f"error: {what}; {advice}", file=sys.stderr)
        sys.exit(kind.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
