"""Which share of small changes of the code do the tests notice?

    python tests/mutation.py --folder iwin_dit/diffusion --sample 60 --seed 0

The tree is copied; each mutant is written into the copy, and a child of this process, which has imported
torch already, runs the tests that execute the changed line, fastest first, until one fails. Processes that a
test starts find the copy first on their path. What each test executes is measured once and kept in ``--map``.

A mutant counts as noticed when a test fails or runs out of time. Its tests are those of the folder's files
(mutation_notes.py) that together took ``--budget`` seconds of a processor; a mutant that other tests alone
would notice counts as a survivor.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import mutation_trace
import pytest
from mutants import Mutant, in_folder
from mutation_map import Recorder, concerned, measure, within
from mutation_notes import EQUIVALENT, NAMED, STUDIES, TESTS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {  # slow to import: what a child needs of them is imported here, for those that follow
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "timm", "torch_fidelity", "numpy"),
    *("scipy", "sklearn", "sympy", "PIL", "jsonargparse", "yaml", "safetensors", "huggingface_hub", "einops"),
}
NOT_COPIED = (".*", "runs", "data", "samples", "build", "dist", "*.egg-info")  # of the root


class Tree:
    """A copy of the project in which files are changed and tests run."""

    def __init__(self, root: Path, scratch: Path):
        self.root, self.scratch = (scratch / "tree").resolve(), scratch
        self.root.mkdir()
        for path in root.iterdir():
            if not any(path.match(pattern) for pattern in NOT_COPIED):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, self.root / path.name)
        self.modules = scratch / "modules"
        shutil.copy(mutation_trace.__file__, self.root / "sitecustomize.py")

    def test(self, arguments: list[str], timeout: float, trace: Path | None = None) -> tuple[int | None, str]:
        """pytest's exit code in a forked child, None where it ran out of time, and what it printed."""
        log = self.scratch / "log"
        child = os.fork()
        if not child:
            self._child(arguments, log, trace)
        deadline, code = time.monotonic() + timeout, None
        while time.monotonic() < deadline and code is None:
            ended, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            time.sleep(0 if ended else 0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what its tests left running
        if code is None:
            os.waitpid(child, 0)
        self._import_what_it_did()
        return code, log.read_text(errors="replace")

    def _import_what_it_did(self) -> None:
        names = self.modules.read_text().split() if self.modules.exists() else []
        for name in names:
            if name not in sys.modules and name.split(".")[0] in PACKAGES:
                with contextlib.suppress(Exception), contextlib.redirect_stderr(None):
                    importlib.import_module(name)

    def _child(self, arguments: list[str], log: Path, trace: Path | None) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(self.root)
            sys.path[:0] = [str(self.root)]
            os.environ["PYTHONPATH"] = str(self.root)
            plugins = [Recorder(self.root, trace)] if trace else []
            options = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.scratch / 'tests'}"]
            code = int(pytest.main([*options, *arguments], plugins=plugins))
            self.modules.write_text("\n".join(list(sys.modules)))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def check(tree: Tree, mutant: Mutant, measured: dict[str, dict], budget: float) -> tuple[str, str]:
    """(``noticed``, ``survived``, ``not run``, ``equivalent``), and by which test, or why."""
    file = tree.root / mutant.path
    source = file.read_bytes()
    tests, executed = concerned(mutant, source, measured)
    reason = EQUIVALENT.get((mutant.path, mutant.line_after(source)))
    if reason:
        return "equivalent", reason
    if not tests:
        return "not run", "no test executes this function"
    tests, seconds = within(budget, tests, measured)
    try:
        file.write_bytes(mutant.apply(source))
        _forget_bytecode(file)
        code, output = tree.test(["-x", *tests], timeout=90 + 6 * seconds)
    finally:
        file.write_bytes(source)
        _forget_bytecode(file)
    if code:
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if not failed and tree.test(["-x", *tests], timeout=90 + 6 * seconds)[0] != 0:
            sys.exit(f"the tests fail without a mutant, too:\n{output}")
        return "noticed", failed[0].split(" - ")[0][:120] if failed else f"exit {code}"
    if code is None:
        return "noticed", "out of time"
    return "survived" if executed else "not run", f"{len(tests)} tests, {seconds:.0f} s"


def _forget_bytecode(file: Path) -> None:
    """A mutant of the same size, written within the same second, is taken for what was compiled before."""
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        compiled.unlink(missing_ok=True)


def named(root: Path) -> list[Mutant]:
    """The mutants written by hand, for changes that no operator makes; each text occurs once in its file."""
    found = []
    for path, old, new in NAMED:
        source = (root / path).read_text()
        if source.count(old) != 1:
            sys.exit(f"{path}: {old!r} occurs {source.count(old)} times, expected once; correct NAMED")
        start = len(source[: source.index(old)].encode())
        line = source[: source.index(old)].count("\n") + 1
        found.append(Mutant(path, line, start, start + len(old.encode()), old, new))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", nargs="*", default=[], help="folders of the package, from the root")
    parser.add_argument("--only", default="*", help="a pattern of file names, such as guidance.py")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each folder, 0: all (default: 60)")
    parser.add_argument("--named", action="store_true", help="the mutants written by hand too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests of a mutant (default: 60)")
    parser.add_argument("--tests", nargs="*", help="test files (default: those of the folder)")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the project (default: this one)")
    parser.add_argument("--map", type=Path, default=ROOT / "runs" / "mutation" / "map.json")
    args = parser.parse_args()
    if unknown := [folder for folder in args.folder if not (args.tests or folder in TESTS)]:
        parser.error(f"--folder {unknown[0]} has no tests; give --tests, or one of {', '.join(TESTS)}")
    if not (args.folder or args.named):
        parser.error("give --folder FOLDER, or --named")
    folders = {*TESTS, *args.folder, *(str(Path(path).parent) for path, *_ in NAMED)}
    os.environ[mutation_trace.FOLDERS] = " ".join(sorted(folders))
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        tree = Tree(args.root, Path(scratch))
        for folder in args.folder:
            found = [m for m in in_folder(tree.root, folder, STUDIES) if Path(m.path).match(args.only)]
            count = min(args.sample or len(found), len(found))
            chosen = sorted(random.Random(args.seed).sample(found, count), key=lambda m: (m.path, m.start))
            report(tree, folder, chosen, args)
        if args.named:
            report(tree, "iwin_dit/evaluation", named(tree.root), args)


def report(tree: Tree, folder: str, chosen: list[Mutant], args: argparse.Namespace) -> None:
    """Checks the mutants and prints a line for each, and the share of those that were noticed."""
    tests = args.tests or [f"tests/{name}.py" for name in TESTS[folder].split()]
    measured = measure(tree, [name for name in tests if (tree.root / name).is_file()], args.map)
    counts = dict.fromkeys(("noticed", "survived", "not run", "equivalent"), 0)
    for mutant in chosen:
        outcome, detail = check(tree, mutant, measured, args.budget)
        counts[outcome] += 1
        old, new = (" ".join(text.split())[:100] for text in (mutant.old, mutant.new))
        print(f"{outcome:10} {mutant.path}:{mutant.line}  {old}  ->  {new}  [{detail}]", flush=True)
    relevant = len(chosen) - counts["equivalent"]
    share = f"{counts['noticed']} of {relevant} noticed ({100 * counts['noticed'] / max(relevant, 1):.0f} %)"
    others = ", ".join(f"{counts[k]} {k}" for k in ("survived", "not run", "equivalent"))
    print(f"{folder}, seed {args.seed}: {share}; {others}", flush=True)


if __name__ == "__main__":
    main()
