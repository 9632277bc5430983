"""The wheel: built, installed into a fresh environment, and used from a folder of one's own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_vae
from PIL import Image

from iwin_dit import IwinDiTPipeline, __version__
from iwin_dit.commands import COMMANDS
from iwin_dit.config.parse import RECIPES, find_recipe, parse_arguments
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.runtime.errors import ConfigError


def call(*command, cwd=None, **environment):
    """``call(*command) -> (exit code, output)``; the checkout is not on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    options = dict(cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended = subprocess.run(list(map(str, command)), timeout=240, **options)
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, since setuptools leaves its work beside the sources."""
    source = tmp_path_factory.mktemp("source") / "iwin-dit"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("iwin_dit", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", source / "dist")
    code, output = call(sys.executable, "-m", "pip", "wheel", *options, source)
    assert code == 0, output
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory):
    """The folder of the commands of an environment that has the wheel, and all else from this one."""
    root = tmp_path_factory.mktemp("fresh")
    code, output = call(sys.executable, "-m", "venv", "--without-pip", root)
    assert code == 0, output
    pip = (sys.executable, "-m", "pip", "--python", root / "bin" / "python")
    code, output = call(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    assert code == 0, output
    (packages,) = root.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return root / "bin"


def test_a_wheel_holds_the_package_and_its_recipes(wheel):
    assert wheel.name == f"iwin_dit-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"iwin_dit/configs/{path.relative_to(RECIPES)}" for path in RECIPES.rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "iwin_dit").rglob("*.py")}
    assert recipes | modules | {"iwin_dit/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"iwin_dit", f"iwin_dit-{__version__}.dist-info"}


def test_an_image_is_drawn_from_another_folder(commands, tmp_path):
    run = tmp_path / "runs" / "small"
    model = make_model(num_classes=10, prediction_type="flow_prediction")
    export_pipeline(
        IwinDiTPipeline(model, make_vae(), FlowMatching().scheduler()), run / "pipeline", {"step": 1}
    )
    shutil.copy(RECIPES / "quickstart.yaml", run / "config.yaml")
    code, output = call(commands / "iwin-dit", "sample", "--class", 3, cwd=tmp_path)
    assert code == 0, output
    assert "4 images in samples.png" in output
    assert Image.open(tmp_path / "samples.png").width > 4 * 64


def test_help_and_mistakes_load_no_torch(commands, tmp_path):
    for name in ("torch", "diffusers", "accelerate"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')")

    def answer(*arguments):
        return call(commands / "iwin-dit", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))

    assert answer("--version") == (0, f"iwin-dit {__version__}\n")
    for arguments in ((), ("--help",)):
        code, output = answer(*arguments)
        assert code == 0
        assert all(f"\n  {command} " in output for command in COMMANDS)
    for command in COMMANDS:
        code, output = answer(command, "--help")
        assert (code, output.splitlines()[0].startswith(f"usage: iwin-dit {command} ")) == (0, True), output
    for arguments, error in (
        (("smaple",), "iwin-dit has no command smaple; did you mean sample?"),
        (
            ("train", "--config", "quikstart"),
            "neither a file nor a recipe that comes with iwin-dit; did you mean",
        ),
        (("train", "--config", "quickstart", "--model.heads", "3"), "model: 3 heads"),
        (("evaluate",), "--generated is missing; see --help"),
    ):
        code, output = answer(*arguments)
        assert code == 2, output
        assert output.startswith("error: "), output
        assert error in output


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("compare/iwin").samefile(ROOT / "configs" / "compare" / "iwin.yaml")
    assert find_recipe("digits", "classifier").samefile(ROOT / "configs" / "classifier" / "digits.yaml")
    assert find_recipe("mine.yaml") == Path("mine.yaml")
    by_name, by_path = (parse_arguments([], name)[0] for name in ("quickstart", RECIPES / "quickstart.yaml"))
    assert by_name == by_path
    with pytest.raises(ConfigError, match="did you mean compare/swin_v2"):
        find_recipe("compare/swinv2")
    Path("quickstart").write_text("seed: 1")
    assert find_recipe("quickstart") == Path("quickstart"), "a file of one's own comes first"
