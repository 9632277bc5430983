"""Which tests execute a line? Each test file is run once with a trace, for tests/mutation.py.

Seconds are of the processor, so that the load of the machine does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import mutation_trace
import pytest
from mutants import KEPT, Mutant, owners, statement_lines


class Recorder:
    """A plugin of pytest: a file of lines for each test, and for each fixture that several tests share."""

    def __init__(self, root: Path, folder: Path):
        self.folder, self.tests = folder, {}
        self._to("collection")
        mutation_trace.start(root)

    def _to(self, name: str) -> None:
        self.now = name
        path = str(self.folder / hashlib.sha256(name.encode()).hexdigest())
        mutation_trace.write_to(path)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self._to(item.nodeid)
        self.tests[item.nodeid] = {
            "file": os.environ[mutation_trace.TRACE],
            "fixtures": list(item.fixturenames),
        }
        begun = sum(os.times()[:4])
        yield
        self.tests[item.nodeid]["seconds"] = round(sum(os.times()[:4]) - begun, 3)
        self._to("collection")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before = self.now
        if fixturedef.scope != "function":
            self._to(f"fixture {fixturedef.argname}")
            self.tests.setdefault(f"fixture {fixturedef.argname}", {"file": os.environ[mutation_trace.TRACE]})
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


def measure(tree: Any, tests: list[str], path: Path) -> dict[str, dict]:
    """``{test: {"seconds": s, "ran": {"file function": [line offsets]}}}``."""
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in tests:
        digest = hashlib.sha256((tree.root / name).read_bytes()).hexdigest()
        if known.get(name, {}).get("digest") == digest:
            continue
        trace = tree.scratch / "trace"
        shutil.rmtree(trace, ignore_errors=True)
        trace.mkdir()
        start = time.monotonic()
        code, output = tree.test([name], timeout=1800, trace=trace)
        found = read(tree.root, trace)
        known[name] = {"digest": digest, "tests": found}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
        seconds = time.monotonic() - start
        print(f"measured {name}: {len(found)} tests, exit {code}, {seconds:.0f} s", flush=True)
        if code:
            print("\n".join(output.splitlines()[-8:]), flush=True)
    return {test: found for name in tests for test, found in known[name]["tests"].items()}


def concerned(mutant: Mutant, source: bytes, measured: dict[str, dict]) -> tuple[list[str], bool]:
    """The tests of a mutant, fastest first, and whether one of them executes its line.

    Of a function that changed since the tests were measured, all tests that execute any of it.
    """
    function, offset = owners(source).get(mutant.line, ("", 0))
    lines = statement_lines(source).get(mutant.line, range(mutant.line, mutant.line + 1))
    offsets = {line - mutant.line + offset for line in lines}
    if not function or function.endswith(KEPT):  # executed as the module is imported, or once for all
        key = f"{mutant.path} "
        chosen = [t for t, m in measured.items() if any(k.startswith(key) for k in m["ran"])]
        return sorted(chosen, key=lambda t: measured[t]["seconds"]), bool(chosen)
    ran = {t: m["ran"].get(f"{mutant.path} {function}", []) for t, m in measured.items()}
    chosen = [t for t, found in ran.items() if offsets.intersection(found)]
    anyway = chosen or [t for t, found in ran.items() if found]
    return sorted(anyway, key=lambda t: measured[t]["seconds"]), bool(chosen)


def within(budget: float, tests: list[str], measured: dict[str, dict]) -> tuple[list[str], float]:
    """As many of the fastest tests as the budget holds, one at least, and their seconds."""
    total, taken = 0.0, []
    for test in tests:
        if taken and total + measured[test]["seconds"] > budget:
            break
        taken.append(test)
        total += measured[test]["seconds"]
    return taken, total
