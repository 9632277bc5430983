"""docs/extending.md is true: what it adds works in a copy of the package, in the files that it names."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def changes(section):
    """``(path, language, text)`` of each block that belongs to a file: the last one named before it."""
    found, end, path = [], 0, None
    for block in BLOCK.finditer(section):
        named = re.findall(r"`(iwin_dit/[\w/]+\.py)`", section[end : block.start()])
        path, end = named[-1] if named else path, block.end()
        if block[1] != "bash":
            found.append((path, block[1], block[2]))
    return found


def commands(section):
    return [
        shlex.split(line)
        for lang, text in BLOCK.findall(section)
        if lang == "bash"
        for line in text.splitlines()
    ]


def apply(root, path, language, text):
    """Writes a new file, or replaces what a diff shows, which is there once."""
    if language == "python":
        assert not (root / path).exists(), path
        (root / path).write_text(text)
        return
    lines = text.splitlines(keepends=True)
    assert all(line[0] in " +-" for line in lines), text
    before, after = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
    before, after = before.rstrip("\n"), after.rstrip("\n")
    content = (root / path).read_text()
    assert content.count(before) == 1, f"{path} has {content.count(before)} times:\n{before}"
    (root / path).write_text(content.replace(before, after))


@pytest.mark.parametrize("title", SECTIONS)
def test_one_of_a_kind_touches_two_files_at_most(title):
    assert len({path for path, _, _ in changes(SECTIONS[title])}) <= 2
    assert commands(SECTIONS[title])


@pytest.fixture(scope="module")
def outcome(latents_folder, tmp_path_factory):
    """The folder, and ``{title: error or None}`` of all sections, in one process with all changes."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "iwin_dit", root / "iwin_dit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", root / "configs")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, root)
    for section in SECTIONS.values():
        for change in changes(section):
            apply(root, *change)
    todo = {title: commands(section) for title, section in SECTIONS.items()}
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "extended.py", latents_folder],
        cwd=root,
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        timeout=280,
        env={"PYTHONPATH": f"{root}:{ROOT / 'tests'}", "HOME": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return root, json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_is_true(outcome, title):
    _, errors = outcome
    assert errors[title] is None, errors[title]


@pytest.mark.parametrize(
    ("result", "figures"),
    [("means", {"means"}), ("colours", {"FD (colours)", "KID (colours)", "KID_std (colours)"})],
)
def test_a_new_metric_and_a_new_extractor_have_figures_of_their_own(outcome, result, figures):
    root, _ = outcome
    assert json.loads((root / f"{result}.json").read_text())["figures"].keys() == figures
