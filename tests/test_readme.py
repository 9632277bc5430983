"""Every command of the README and its pages runs, in a copy of the checkout whose recipes take seconds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from iwin_dit.data import digits

README = (ROOT / "README.md").read_text()
PAGES = {  # in an order in which each finds what the ones before have made
    name: (ROOT / "docs" / f"{name}.md").read_text()
    for name in (
        *("backbone", "sampling", "recipe", "training", "evaluation", "mixers", "video", "data", "measured"),
    )
}
INSTALLS = (
    "make demo",
    "make demo-video",
    "make compare",
    "make ablate",
    "make transfer",
    "pip install -c constraints.txt -e '.[demo]'",
)  # .ci/run, from a bare checkout; the last two, which take hours, in small by test_compare.py
SNIPPETS = re.findall(r"```python\n(.*?)```", "\n".join([README, *PAGES.values()]), re.S)


def commands_of(page):
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    return [line for block in blocks for line in block.strip().splitlines() if line not in INSTALLS]


TRAIN, *OTHERS = commands_of(README)
LATER = {name: commands_of(page) for name, page in PAGES.items()}
COMMANDS = list(dict.fromkeys([TRAIN, *LATER.pop("backbone"), *OTHERS, *chain(*LATER.values())]))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Recipes are shortened; the commands are not."""
    root = tmp_path_factory.mktemp("read me") / "iwin-dit"
    ignore = shutil.ignore_patterns(".*", "runs", "data", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, root, ignore=ignore, symlinks=True)
    shutil.copytree(ROOT / "iwin_dit" / "data", root / "iwin_dit" / "data", dirs_exist_ok=True)
    for name in (
        "quickstart",
        "pixels_quickstart",
        "video_quickstart",
        "classifier/digits",
        "classifier/moving_digits",
    ):
        path = root / "configs" / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["train"] |= {"max_steps": 4, "sample_every_steps": 0, "evaluate_every_steps": 0}
        if "sample" in recipe:
            recipe["sample"]["num_inference_steps"] = 2
            recipe["model"] |= {"depth": 2, "width": 32, "heads": 2}
        path.write_text(yaml.safe_dump(recipe))
    for path, words, fewer in (
        ("iwin_dit/data/digits.py", f"VAE_STEPS = {digits.VAE_STEPS}", "VAE_STEPS = 4"),
        ("iwin_dit/data/moving_digits.py", "VAE_STEPS = 500, 200", "VAE_STEPS = 8, 2"),
        ("iwin_dit/data/digits.py", "in progress(chosen,", "in progress(chosen[:200],"),
        (
            "benchmarks/mixers.py",
            "TOKENS, WIDTH, HEADS = 4096, 768, 12",
            "TOKENS, WIDTH, HEADS = 1024, 24, 2",
        ),
        ("benchmarks/mixers.py", "CASES = [(16, 8), (32, 16), (64, 32), (64, 16)]", "CASES = [(16, 8)]"),
    ):
        text = (root / path).read_text()
        assert words in text
        (root / path).write_text(text.replace(words, fewer))
    return root


FORKS = """
import json, os, runpy, sys, traceback
import accelerate, diffusers, matplotlib.pyplot, timm, torch, torchvision
for line in sys.stdin:
    kind, *sys.argv = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            if kind == "script":
                sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            if kind == "text":
                exec(sys.argv.pop(0), {"__name__": "__main__"})
            else:
                {"script": runpy.run_path, "module": runpy.run_module}[kind](sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def execute(checkout):
    """``execute(command) -> output`` in the copy: a fork of a process that has imported torch and others.

    What starts no Python, and the first command of all, are processes of their own.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = dict(cwd=checkout, env=os.environ | {"PATH": path, "PYTHONPATH": str(checkout)}, text=True)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server = subprocess.Popen([sys.executable, "-c", FORKS], **pipes, **options)
    begun = []

    def call(command):
        match shlex.split(command) if isinstance(command, str) else command:
            case ["accelerate", "launch", *words] | ["python", *words] if begun:
                kind, words = ("module", words[1:]) if words[0] == "-m" else ("script", words)
                words = ["text", words[1]] if words[0] == "-c" else [kind, *words]
                print(json.dumps(words), file=server.stdin, flush=True)
                code, output = int(server.stdout.readline()), (checkout / "output").read_text()
            case words:
                ended = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
                code, output = ended.returncode, ended.stdout
        begun.append(command)
        assert code == 0, f"{command}\n{output[-4000:]}"
        return output

    yield call
    server.communicate()


def test_the_commands_of_the_readme(checkout, execute):
    assert len(COMMANDS) >= 18
    for command in COMMANDS:
        execute(command)
    for made in (
        "runs/quickstart/report/samples.png",
        "runs/quickstart/loss.png",
        "runs/quickstart/evaluation.json",
        "samples.png",
        "samples/0007-00007.png",
        "data/mine/contact.png",
        "clips.mp4",
        "runs/video_quickstart/report/samples.gif",
        "data/my_clips/index.json",
        "runs/moving_digits_classifier/model.safetensors",
    ):
        assert (checkout / made).is_file()
    assert "FD (iwin)" in (checkout / "runs/quickstart/report/report.md").read_text()
    for snippet in SNIPPETS:
        if "timm" in snippet:
            execute(["python", "-c", snippet + "\nassert len(maps.feature_info.channels()) == 3"])
    images = execute(["python", "-c", SNIPPETS[0] + "\nprint(len(images), images[0].size)"])
    assert images.strip().endswith("2 (32, 32)")


def test_the_readme_and_the_pages_name_what_exists():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path}: {target}"
    from iwin_dit import convert

    for name in re.findall(r"from iwin_dit.convert import (.*)", PAGES["sampling"])[0].split(", "):
        assert hasattr(convert, name)


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 130
    assert all(f"docs/{name}.md" in README for name in PAGES)
