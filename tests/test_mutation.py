"""The mutation check on a module of a few lines: what it makes, notices and misses."""

import subprocess
import sys

from conftest import ROOT
from mutants import mutants
from mutation import named
from mutation_notes import EQUIVALENT, NAMED

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
    assert ("-é", "(é)") in made("x = 'ü', -é"), "offsets count bytes"


def test_the_notes_are_of_the_code_as_it_is():
    """A change that was written by hand is made where its text stands; what changes nothing is a change."""
    assert len(named(ROOT)) == len(NAMED)
    for path in {path for path, _ in EQUIVALENT}:
        source = (ROOT / path).read_bytes()
        lines = {mutant.line_after(source) for mutant in mutants(path, source)}
        assert {line for found, line in EQUIVALENT if found == path} <= lines, path


def test_mutants_that_tests_notice_and_miss(tmp_path):
    for path, text in (("toy/code.py", TOY), ("tests/test_toy.py", TEST)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    command = [sys.executable, ROOT / "tests" / "mutation.py", "--root", tmp_path, "--folder", "toy"]
    command += ["--sample", "0", "--map", tmp_path / "map.json", "--tests", "tests/test_toy.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    outcomes = {line.split(" [")[0]: line for line in lines}
    assert "test_smallest" in outcomes["noticed toy/code.py:2 a >= b -> (a < b)"]
    assert "survived toy/code.py:2 a >= b -> (a > b)" in outcomes
    assert "not run toy/code.py:5 a += a -> pass" in outcomes
    assert lines[-1] == "toy, seed 0: 2 of 4 noticed (50 %); 1 survived, 1 not run, 0 equivalent"
    assert (tmp_path / "toy" / "code.py").read_text() == TOY, "only the copy is changed"
