"""Progress bars and lines for whoever watches; that nobody does is no error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class _Patient:
    """A stream whose reader may go away: then what is written is dropped.

    A pipe is closed at the other end, as in ``| head``; a terminal that was closed answers with EIO.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A tqdm bar; where nobody watches, one line in ten seconds instead of ten in one."""
    watched = sys.stderr is not None and sys.stderr.isatty()
    options = {"mininterval": 0.1 if watched else 10.0, "dynamic_ncols": watched} | options
    stream = None if sys.stderr is None else _Patient(sys.stderr)
    return tqdm(iterable, file=stream, **options)


def say(text: str) -> None:
    """A line on the terminal, in the middle of work that must not stop for it."""
    with contextlib.suppress(OSError):
        print(text, flush=True)
