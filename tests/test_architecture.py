"""Arrows between packages point down only; no code path can run what it reads."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "iwin_dit"
MAY_IMPORT = {  # of ours
    "layers": {"layers"},
    "models": {"models", "layers"},
    "diffusion": {"diffusion"},
    "runtime": {"runtime"},
    "data": {"data", "runtime"},
    "training": {"training", "runtime"},
    "convert": {"convert", "models", "layers", "runtime"},
    "pipelines": {"pipelines", "models", "diffusion", "data", "runtime"},
}
THIRD_PARTY = {
    "layers": {"torch", "einops", "triton"},
    "models": {"torch", "diffusers", "timm"},
    "config": {"yaml", "jsonargparse"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Modules that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    parts = path.relative_to(PACKAGE).parts
    part = parts[0] if len(parts) > 1 and path.name != "__main__.py" else None  # a script stands on top
    for module in imports(path):
        names = module.split(".")
        if names[0] == "iwin_dit" and part in MAY_IMPORT and len(names) > 1:
            assert names[1] in MAY_IMPORT[part], f"{part} imports {module}"
        known = THIRD_PARTY.get(part) or THIRD_PARTY.get(path.stem if part is None else "")
        if (
            known
            and names[0] not in (*known, "iwin_dit")
            and names[0] in {"diffusers", "timm", "accelerate", "torch"}
        ):
            pytest.fail(f"{path} imports {module}")


def test_files_are_one_idea():
    for path in [*FILES, *ROOT.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_scripts_are_thin():
    for path in ROOT.glob("*.py"):
        assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 100, path
    assert Path(PACKAGE / "config.py").exists()
