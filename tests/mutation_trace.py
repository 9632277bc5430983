"""Writes the lines of a project that a process executes to a file, as it executes them.

For tests/mutation.py, which copies this file to where Python imports it as a process starts. Processes that a
test starts, forks or kills leave their lines too.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

TRACE, FOLDERS = "MUTATION_TRACE", "MUTATION_FOLDERS"  # of this process and of those that it starts
_seen: set[tuple[str, int]] = set()
_file = -1


def write_to(path: str) -> None:
    """What is executed from here on goes to this file, here and in the processes that start from here."""
    global _file
    if _file >= 0:
        os.close(_file)
    _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ[TRACE] = path
    _seen.clear()


def start(root: Path) -> None:
    """Traces the folders of the project that FOLDERS names; :func:`write_to` says where to."""
    paths = [path for folder in os.environ[FOLDERS].split() for path in (root / folder).glob("*.py")]
    ours = {str(path): str(path.relative_to(root)) for path in paths}

    def line(frame, event, _):
        if event == "line":
            found = ours[frame.f_code.co_filename], frame.f_lineno
            if found not in _seen:
                _seen.add(found)
                os.write(_file, f"{found[0]}:{found[1]}\n".encode())
        return line

    def call(frame, event, _):
        return line if frame.f_code.co_filename in ours else None

    threading.settrace(call)
    sys.settrace(call)


if __name__ == "sitecustomize" and TRACE in os.environ:
    write_to(os.environ[TRACE])
    start(Path(__file__).resolve().parent)
