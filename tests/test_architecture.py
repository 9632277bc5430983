"""The rooms of the package, and the arrows between them: ``python tests/test_architecture.py --draw``."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "iwin_dit"
MAY_IMPORT = {  # rooms, from the bottom up; a file of a room may import these beside its own
    "runtime": set(),
    "layers": set(),
    "diffusion": set(),
    "config": {"runtime", "layers", "diffusion"},  # of both the specs alone, see below
    "models": {"layers"},
    "data": {"runtime"},
    "training": {"runtime", "layers", "config"},
    "convert": {"models", "layers", "runtime"},
    "pipelines": {"models", "diffusion", "data", "runtime"},
    "evaluation": {"config", "convert", "data", "pipelines", "runtime"},
    "build": {
        *("config", "convert", "data", "diffusion", "evaluation"),
        *("layers", "models", "pipelines", "runtime", "training"),
    },
}
MAY_IMPORT["commands"] = set(MAY_IMPORT)
HALF_OPEN = ("iwin_dit.layers", "iwin_dit.diffusion")  # to a config, which needs no torch
WITHOUT_TORCH = {  # what a config may know of them
    *("iwin_dit.layers.specs", "iwin_dit.layers.blindness", "iwin_dit.diffusion.specs")
}
THIRD_PARTY = {  # of the heavy ones
    "layers": {"torch", "einops", "triton"},
    "models": {"torch", "diffusers", "timm"},
    "diffusion": {"torch", "diffusers"},
    "config": {"yaml", "jsonargparse"},
}
HEAVY = {"torch", "diffusers", "timm", "accelerate", "einops", "triton"}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
LONGEST = 60  # lines of a function's code, below its arguments and docstring
LOOP = ("training/loop.py", "train")  # is told from top to bottom


def imports(path: Path) -> list[str]:
    """The modules that a file imports, at any level of the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
            if node.module.count(".") < 2:  # names of modules, perhaps
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(path: Path) -> str | None:
    """None for the package itself, and for a program, which stands on top: ``python -m iwin_dit.convert``."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 and path.name != "__main__.py" else None


def arrows() -> dict[str, set[str]]:
    """The other rooms that each room imports."""
    found: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for path in FILES:
        room = room_of(path)
        for module in imports(path) if room else ():
            names = module.split(".")
            if names[0] == "iwin_dit" and len(names) > 1 and names[1] in MAY_IMPORT and names[1] != room:
                found[room].add(names[1])
    return found


def test_every_folder_is_a_room_and_nothing_lies_loose():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "configs"} == set(
        MAY_IMPORT
    )
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} <= {"__init__.py", "py.typed"}
    assert len(MAY_IMPORT) <= 20


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_down(room):
    assert arrows()[room] <= MAY_IMPORT[room]


def test_there_is_no_circle():
    below = list(TopologicalSorter(MAY_IMPORT).static_order())
    assert set(below) == set(MAY_IMPORT)
    with pytest.raises(CycleError):
        list(TopologicalSorter(MAY_IMPORT | {"runtime": {"build"}}).static_order())


def test_modules_of_a_room_make_no_circle_either():
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in top_level_imports(path) if name.startswith("iwin_dit.")} - {module}
    known = set(graph)
    list(TopologicalSorter({module: names & known for module, names in graph.items()}).static_order())


def top_level_imports(path: Path) -> list[str]:
    """What is imported when the file is; not what a function imports when it is called."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_what_its_room_may(path):
    room = room_of(path)
    for module in imports(path):
        name = module.partition(".")[0]
        assert name != "studies", f"{path} imports {module}"
        if room == "config" and module.startswith(HALF_OPEN):
            assert module in WITHOUT_TORCH | {*HALF_OPEN}, f"{path} imports {module}"
        if room in THIRD_PARTY and name in HEAVY:
            assert name in THIRD_PARTY[room], f"{path} imports {module}"


def test_files_are_one_idea():
    for path in [*FILES, *SCRIPTS]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_functions_are_short():
    for path in [*FILES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                place = (str(path.relative_to(PACKAGE if path in FILES else ROOT)), node.name)
                code = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - code[0].lineno + 1 if code else 0
                assert lines <= LONGEST or place == LOOP, place


def test_scripts_are_thin():
    for path in SCRIPTS:
        assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 100, path


def draw() -> None:
    """Prints the rooms from the top down, each with the rooms that it imports."""
    found = arrows()
    below = list(TopologicalSorter(MAY_IMPORT).static_order())
    for room in reversed(below):
        lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / room).rglob("*.py"))
        print(f"{room:11} {lines:6,} lines -> {', '.join(sorted(found[room], key=below.index)) or '-'}")
    up = sum(below.index(other) > below.index(room) for room in found for other in found[room])
    print(f"{len(found)} rooms, {up} arrows that run back up, 0 circles")


if __name__ == "__main__":
    if sys.argv[1:] != ["--draw"]:
        sys.exit(f"usage: python {sys.argv[0]} --draw")
    draw()
