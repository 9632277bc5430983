"""The mutation check on a module of a few lines: what it makes, notices and misses."""

import subprocess
import sys

from conftest import ROOT
from mutation import mutants

CODE = '''
"""A docstring with 1 < 2."""

def smallest(a: int, b: int = 0) -> int | None:
    if a is None:
        raise ValueError(f"found {a}, expected more than {1 + 1}")
    return a if a < b else b


def unused(values):
    values.append(1)
'''
TOY = """def smallest(a, b):
    return [a, b][a >= b]

def unused(a):
    a += a
"""
TEST = """from toy.code import smallest

def test_smallest():
    assert [smallest(1, 2), smallest(2, 1)] == [1, 1]
"""
CHECK = """import sys, mutation
from pathlib import Path
mutation.ROOT, mutation.TESTS, mutation.PACKAGES = Path(sys.argv.pop(1)), {"toy": "toy"}, ()
mutation.main()
"""


def made(code):
    return {(m.old, m.new) for m in mutants("code.py", code.encode())}


def test_what_is_changed():
    assert made(CODE) == {
        ("0", "(1)"),
        ("a is None", "(a is not None)"),
        ('raise ValueError(f"found {a}, expected more than {1 + 1}")', "pass"),
        ("return a if a < b else b", "return None"),
        ("a < b", "(a <= b)"),
        ("a < b", "(a >= b)"),
        ("values.append(1)", "pass"),
        ("1", "(2)"),
        ("1", "(-1)"),
    }
    assert made("x = f(a, b) if not c else d[1:]") == {
        ("f(a, b)", "(f(b, a))"),
        ("not c", "(c)"),
        ("1", "(2)"),
        ("1", "(-1)"),
    }
    (changed,) = (m.text for m in mutants("code.py", "x = 'ü', -é".encode()))
    assert changed == "x = 'ü', (é)".encode(), "offsets count bytes"


def test_mutants_that_tests_notice_and_miss(tmp_path):
    for path, text in (("toy/code.py", TOY), ("tests/test_toy.py", TEST)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    command = [sys.executable, "-c", CHECK, tmp_path, "--sample", "0"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    outcomes = {line.rpartition(" [")[0]: line for line in lines[:-1]}
    assert "test_smallest" in outcomes["noticed    toy/code.py:2 a >= b -> (a < b)"]
    assert "survived   toy/code.py:2 a >= b -> (a > b)" in outcomes
    assert "not run    toy/code.py:5 a += a -> pass" in outcomes
    assert lines[-1] == "toy, seed 0, 1 tests: {'noticed': 2, 'survived': 1, 'not run': 1}"
    assert (tmp_path / "toy" / "code.py").read_text() == TOY, "only the copy is changed"
