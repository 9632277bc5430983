"""Which share of small changes of the code do the tests notice?

    python tests/mutation.py iwin_dit/diffusion --sample 60 --seed 0

The tree is copied. Each change, a mutant, is written into the copy; a child of this process, which has
imported torch already, runs the tests that execute the changed line, fastest first, until one fails.
Which lines a test executes is measured before, in the test's own process. A mutant counts as survivor if only
tests of other files than TESTS, or beyond BUDGET, would notice it, and also if it changes nothing.
"""

import argparse
import ast
import compileall
import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("torchvision", "timm", "diffusers", "accelerate", "torch_fidelity")  # slow
ROOT = Path(__file__).resolve().parent.parent
BUDGET = 60  # seconds of a processor, of the tests of one mutant
TESTS = {  # files of tests/, without test_ and .py
    "iwin_dit/diffusion": "diffusion guidance schedules pipeline",
    "iwin_dit/training": "data optimizer reports state posthoc checkpoint classification replicas "
    "micro_batches levers config monitor muon alignment faults/saving faults/resuming faults/running",
    "iwin_dit/data": "data codec digits pixels images folders sources labels limits transparency "
    "latent_faults video extraction classification clip_training clip_classifier extraction_faults storage "
    "faults/hostile_files faults/storage_errors",
    "iwin_dit/evaluation": "rules sets frechet metrics every_sample extractors evaluate clips monitor "
    "faults/evaluation faults/evaluation_files",
}
COMPARISONS = {
    **{ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt)},
    **{ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt)},
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)},
    **{ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)},
}
ARITHMETIC = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}
SAID = {"print", "say", "warn", "warning", "info", "debug"}  # calls that only tell the user something
FIXED = {"min", "max", "minimum", "maximum", "allclose", "equal"}  # whose arguments may change places
FIXED |= {"isinstance", "issubclass", "hasattr", "getattr", "cast"}  # or fail at once


@dataclass(frozen=True)
class Mutant:
    """One change of a file, whose whole text it holds."""

    path: str
    line: int
    old: str
    new: str
    text: bytes


def mutants(path: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a file, in its order."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, replacement in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        new = ast.unparse(replacement)
        new = f"({new})" if isinstance(replacement, ast.expr) else new
        text = source[:start] + new.encode() + source[end:]
        yield Mutant(path, node.lineno, source[start:end].decode(), new, text)


def _changes(tree: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    """Nodes, each with what takes its place. Annotations and messages stay."""
    for node in ast.iter_child_nodes(tree):
        yield from ((node, replacement) for replacement in _replacements(node))
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.comprehension):
            for test in getattr(node, "ifs", None) or [getattr(node, "test", None)]:
                if isinstance(test, ast.Name | ast.Call | ast.Attribute):
                    yield test, ast.UnaryOp(ast.Not(), test)
        if isinstance(node, ast.JoinedStr | ast.Raise) or _says(node):
            continue
        for field in {"returns", "annotation"}.intersection(node._fields):
            node = _with(node, **{field: None})
        yield from _changes(node)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare():
            for at, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield _with(node, ops=[*node.ops[:at], other(), *node.ops[at + 1 :]])
        case ast.BinOp() if type(node.op) in ARITHMETIC and not (_text(node.left) or _text(node.right)):
            yield _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1 if abs(node.value) < 1e6 else 2 * node.value)
            if node.value:
                yield ast.UnaryOp(ast.USub(), node)
        case ast.Return(value=ast.expr()) if getattr(node.value, "value", 0) is not None:
            yield ast.Return(ast.Constant(None))
        case ast.Call(args=[first, second]) if not (_says(node) or _name(node.func) in FIXED):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                yield _with(node, args=[second, first])
        case ast.Raise() | ast.Delete() | ast.AugAssign() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Expr(value=ast.Call()) if not _says(node.value):
            yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _says(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in SAID


def _text(node: ast.AST) -> bool:
    number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    return isinstance(node, ast.JoinedStr | ast.Constant) and not number


class Recorder:
    """A plugin of pytest: which lines each test that passes executes, and its seconds of a processor."""

    def __init__(self, root: Path, folder: str, result: Path):
        self.ours = {str(path): str(path.relative_to(root)) for path in (root / folder).glob("*.py")}
        self.result, self.parts, self.tests, self.name = result, defaultdict(set), {}, ""

    def _call(self, frame: Any, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self.ours else None

    def _line(self, frame: Any, event: str, argument: object) -> Any:
        self.parts[self.name].add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.name, failed, begun = item.nodeid, item.session.testsfailed, sum(os.times()[:4])
        threading.settrace(self._call)
        sys.settrace(self._call)  # again for each test: some code takes it away
        result = yield
        if item.session.testsfailed == failed:
            parts = (item.nodeid, *item.fixturenames)
            self.tests[item.nodeid] = {"seconds": sum(os.times()[:4]) - begun, "parts": parts}
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before = self.name  # what a fixture of several tests executes belongs to each of them
        self.name = before if fixturedef.scope == "function" else fixturedef.argname
        try:
            return (yield)
        finally:
            self.name = before

    def pytest_sessionfinish(self) -> None:
        for test in self.tests.values():
            lines = set().union(*(self.parts[part] for part in test.pop("parts")))
            test["ran"] = [f"{self.ours[file]}:{line}" for file, line in lines]
        self.result.write_text(json.dumps(self.tests))


class Tree:
    """A copy of the project in which files are changed and tests run."""

    def __init__(self, root: Path, scratch: Path):
        self.root, self.scratch = scratch / "tree", scratch
        self.root.mkdir()
        for path in root.iterdir():
            if path.name[0] != "." and path.name not in ("runs", "data", "samples", "build", "dist"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, self.root / path.name)
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH  # a mutant may be as large and as old
        compileall.compile_dir(self.root, quiet=2, invalidation_mode=by_hash)

    def test(self, tests: list[str], timeout: float, *plugins: object) -> tuple[int | None, str]:
        """pytest's exit code in a forked child, None where it ran out of time, and what it printed."""
        child = multiprocessing.get_context("fork").Process(target=self._child, args=(tests, plugins))
        child.start()
        child.join(timeout)
        code = child.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what its tests left running
        child.join()
        return code, (self.scratch / "log").read_text(errors="replace")

    def _child(self, tests: list[str], plugins: tuple[object, ...]) -> None:
        os.setpgid(0, 0)
        log = os.open(self.scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        os.environ["PYTHONPATH"] = str(self.root)  # of processes that tests start
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.scratch / 'tests'}"]
        sys.exit(int(pytest.main([*options, *tests], plugins=plugins)))


def measure(tree: Tree, folder: str) -> dict[str, dict]:
    """``{test: {"seconds": s, "ran": ["file:line", ...]}}`` of the tests that pass."""
    recorder = Recorder(tree.root, folder, tree.scratch / f"{Path(folder).name}.json")
    tests = [f"tests/{Path(name).parent}/test_{Path(name).name}.py" for name in TESTS[folder].split()]
    tree.test(tests, 7200, recorder)
    return json.loads(recorder.result.read_text())


def concerned(mutant: Mutant, source: bytes, measured: dict[str, dict]) -> list[str]:
    """The tests that execute a mutant, fastest first: as many as BUDGET holds, one at least.

    What is executed as a module is imported, or in a cached function, concerns each test of the file.
    """
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [node for node in statements if node.lineno <= mutant.line <= node.end_lineno]
    functions = [n for n in around if isinstance(n, ast.FunctionDef) and n.body[0].lineno <= mutant.line]
    lines = range(1, source.count(b"\n") + 2)
    if functions and not any("cache" in ast.unparse(d) for n in functions for d in n.decorator_list):
        inner = max(around, key=lambda node: node.lineno)
        end = inner.body[0].lineno - 1 if hasattr(inner, "body") else inner.end_lineno
        lines = range(inner.lineno, max(end, inner.lineno) + 1)
    wanted = {f"{mutant.path}:{line}" for line in lines}
    tests = [test for test, found in measured.items() if not wanted.isdisjoint(found["ran"])]
    tests.sort(key=lambda test: measured[test]["seconds"])
    while len(tests) > 1 and sum(measured[test]["seconds"] for test in tests) > BUDGET:
        tests.pop()
    return tests


def check(tree: Tree, mutant: Mutant, measured: dict[str, dict]) -> tuple[str, str]:
    """``noticed``, ``survived`` or ``not run``, and by which test."""
    file = tree.root / mutant.path
    source = file.read_bytes()
    tests = concerned(mutant, source, measured)
    if not tests:
        return "not run", "no test executes this line"
    timeout = 300 + 6 * sum(measured[test]["seconds"] for test in tests)
    file.write_bytes(mutant.text)
    code, output = tree.test(["-x", *tests], timeout)
    file.write_bytes(source)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code and not failed and tree.test(["-x", *tests], timeout)[0] != 0:
        sys.exit(f"the tests fail without a mutant, too:\n{output}")
    detail = failed[0].split(" - ")[0] if failed else f"exit {code}, {len(tests)} tests"
    return "survived" if code == 0 else "noticed", detail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=list(TESTS), help="of the code, from the root")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each folder, 0: all (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as triton is imported
    for package in PACKAGES:
        importlib.import_module(package)
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        tree = Tree(ROOT, Path(scratch).resolve())
        for folder in args.folders:
            files = sorted(f"{folder}/{path.name}" for path in (tree.root / folder).glob("*.py"))
            found = [mutant for file in files for mutant in mutants(file, (tree.root / file).read_bytes())]
            chosen = random.Random(args.seed).sample(found, min(args.sample or len(found), len(found)))
            measured, counts = measure(tree, folder), dict.fromkeys(("noticed", "survived", "not run"), 0)
            for mutant in sorted(chosen, key=lambda mutant: (mutant.path, mutant.line)):
                outcome, detail = check(tree, mutant, measured)
                counts[outcome] += 1
                change = " ".join(f"{mutant.path}:{mutant.line} {mutant.old} -> {mutant.new}".split())
                print(f"{outcome:10} {change} [{detail}]", flush=True)
            print(f"{folder}, seed {args.seed}, {len(measured)} tests: {counts}", flush=True)


if __name__ == "__main__":
    main()
