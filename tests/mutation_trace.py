"""Which lines of the project does each test execute? For tests/mutation.py.

The lines go to a file of the test as they are executed, so that processes which a test starts, forks or
kills leave theirs too. Seconds are of the processor, so that the load does not count.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from mutants import owners

TRACE = "MUTATION_TRACE"
_seen: set[tuple[str, int]] = set()
_file = None


def write_to(path: str) -> None:
    """What is executed from here on goes to this file, here and in the processes that start from here."""
    global _file
    if _file is not None:
        os.close(_file)
    _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ[TRACE] = path
    _seen.clear()


def start() -> None:
    """Traces the package of the tree that this module lies in."""
    root = str(Path(__file__).resolve().parent)
    ours = {str(path): str(path.relative_to(root)) for path in Path(root).glob("*/**/*.py")}
    write_to(os.environ[TRACE])

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


class Recorder:
    """A plugin of pytest: a file of lines for each test, and for each fixture that several tests share."""

    def __init__(self, root: Path, folder: Path):
        self.folder, self.tests = folder, {}
        self._to("collection")
        start()

    def _to(self, name: str) -> None:
        self.now = name
        os.environ[TRACE] = str(self.folder / f"{name.encode().hex()[:80]}-{abs(hash(name))}")
        write_to(os.environ[TRACE])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self._to(item.nodeid)
        self.tests[item.nodeid] = {"file": os.environ[TRACE], "fixtures": list(item.fixturenames)}
        begun = sum(os.times()[:4])
        yield
        self.tests[item.nodeid]["seconds"] = round(sum(os.times()[:4]) - begun, 3)
        self._to("collection")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before = self.now
        if fixturedef.scope != "function":
            self._to(f"fixture {fixturedef.argname}")
            self.tests.setdefault(f"fixture {fixturedef.argname}", {"file": os.environ[TRACE]})
        yield
        if fixturedef.scope != "function":
            self._to(before)

    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped:
            self.tests[report.nodeid]["unfit"] = True

    def pytest_sessionfinish(self):
        sys.settrace(None)
        (self.folder / "tests.json").write_text(json.dumps(self.tests))


def read(root: Path, folder: Path) -> dict[str, dict]:
    """Of each test that passed its seconds, and ``{"file function": [line offsets]}`` that it executed."""
    index = folder / "tests.json"
    tests = json.loads(index.read_text()) if index.exists() else {}
    functions = {}

    def ran(path: str) -> set[tuple[str, int]]:
        found = set()
        for entry in Path(path).read_text().splitlines():
            name, _, line = entry.rpartition(":")
            if name not in functions:
                functions[name] = owners((root / name).read_bytes())
            if int(line) in functions[name]:
                function, offset = functions[name][int(line)]
                found.add((f"{name} {function}", offset))
        return found

    result = {}
    for test, known in tests.items():
        if test.startswith("fixture ") or known.get("unfit"):
            continue
        lines = ran(known["file"])
        for fixture in known["fixtures"]:
            if f"fixture {fixture}" in tests:
                lines |= ran(tests[f"fixture {fixture}"]["file"])
        found = {}
        for key, offset in sorted(lines):
            found.setdefault(key, []).append(offset)
        result[test] = {"seconds": known["seconds"], "ran": found}
    return result
