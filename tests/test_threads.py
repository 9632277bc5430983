"""Threads that wait soon sleep: the setting is there before torch is loaded, unless the user made another."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TORCH = Path(importlib.util.find_spec("torch").origin).parent
LIBRARIES = sorted(TORCH.glob("lib/libgomp*"))


@pytest.mark.skipif(not LIBRARIES, reason="torch has no libgomp here")
@pytest.mark.parametrize(
    ("users", "spins"),
    [({}, 10_000), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0), ({"GOMP_SPINCOUNT": "7"}, 7)],
)
def test_openmp_finds_the_setting(users, spins):
    """OpenMP itself says what it has read: of libgomp alone, since torch takes seconds to load."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | users
    program = f"import iwin_dit, ctypes; ctypes.CDLL({str(LIBRARIES[0])!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True)
    found = dict(re.findall(r"(\w+) = '(\w+)'", done.stderr.decode()))
    assert int(found["GOMP_SPINCOUNT"]) == spins, done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_scripts_load_nothing_before_the_package(path):
    """What else they import first could load torch; ``python -m iwin_dit.x`` imports the package first."""
    modules = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    names = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert names == {"iwin_dit"}
