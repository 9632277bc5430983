"""Errors that a user can mend. Scripts show them as one line and an exit code, without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import faulthandler
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

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


class ReplicaError(UserError):
    """The processes of a run do not hold the same weights."""

    exit_code = 7


class NonFiniteError(UserError):
    """Training diverged."""

    exit_code = 4


class WorkerError(UserError):
    """A process that reads data died or hangs."""

    exit_code = 5


# Errors of huggingface_hub and of its HTTP clients, by the names of their classes, the closest first.
HUB_ERRORS = {
    "GatedRepoError": "its owner asks for an agreement; give it on huggingface.co and log in (hf auth login)",
    "RepositoryNotFoundError": "the hub has no such repository; a private one needs hf auth login",
    "RevisionNotFoundError": "its repository on the hub has no such revision",
    "RemoteEntryNotFoundError": "its repository on the hub lacks a file that is needed",
    **dict.fromkeys(
        ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"),
        "the hub cannot be reached from here, and it was not fetched before; fetch it where there is a "
        "network (hf download) and give its folder",
    ),
}
HOME = re.compile(r"((?:--[\w.-]+=)?(?:\w+:)?)~(?:[\w.-]*/|$)")
MOST = 500  # characters of another library's message


def printable(path: str) -> str:
    """Names of files need not be UTF-8."""
    return path.encode(errors="replace").decode()


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str, prefix: str = "", cutoff: float = 0.6
) -> str:
    """What a mistyped name was perhaps meant to be, of those ``known``; shown with the ``prefix``."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def reason(error: BaseException) -> str:
    """Why something failed, on one line: the whole sentences of another library's error, or our words.

    Errors of the system come with their path, errors of the hub with what can be done about them.
    """
    if isinstance(error, PermissionError):
        path = error.filename or "it"
        return f"permission denied: {path}; its owner can let others read it (chmod a+rX)"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    for name, words in HUB_ERRORS.items():
        if name in kinds:
            return words
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is missing"
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= MOST:
        return text
    end = max(text.rfind(mark, 0, MOST) for mark in (". ", "! ", "? ", "; "))  # half a sentence would mislead
    return text[:end] if end > 0 else f"{text[:MOST]} ..."


def storage_error(error: OSError, then: str, what: str = "") -> UserError:
    """What the storage has refused, as an error of its own: a disk that is full, or any other.

    Args:
        then: what to do after the storage has been looked at.
        what: what could not be done.
    """
    why = error.strerror or _one_line(error)
    found = f"{f'{what}: ' if what else ''}{why}{f': {error.filename}' if error.filename else ''}"
    if error.errno in FULL:
        return DiskError(f"{found}; make room, and {then}")
    return StorageError(f"{found}; look at its storage and permissions, and {then}")


def _one_line(error: Exception) -> str:
    """An error of a worker process arrives with that process's traceback before its own words."""
    text = str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


def expand_home(value: Any) -> Any:
    """Paths in a user's folder, such as ``~/data``, ``--out=~/data`` and ``iwin:~/run``, as whole paths.

    A shell does it for the first form alone, and nobody does it for a recipe; other values stay as they are.

    Args:
        value: an argument, or what a recipe holds, with lists and keys at any depth.
    """
    if isinstance(value, dict):
        return {key: expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    found = HOME.match(value) if isinstance(value, str) else None
    return value if found is None else found[1] + os.path.expanduser(value[found.end(1) :])


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's ``main`` and ends the process: the user's mistakes as one line, bugs as a traceback."""
    with contextlib.suppress(OSError, RuntimeError):  # where stderr is no file
        faulthandler.enable()  # a crash in a library says where, too
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `| head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        mine = storage_error(error, "run it again")
        print(f"error: {mine}", file=sys.stderr)
        sys.exit(mine.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Says a mistake in the arguments as a :class:`ConfigError`, in one line; takes options in full alone."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")
