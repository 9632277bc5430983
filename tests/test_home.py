"""``~`` in arguments and recipes is the user's folder, and no folder of that name is made."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_pipeline

from iwin_dit.build import loading
from iwin_dit.config.parse import parse_arguments
from iwin_dit.config.schema import Config
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.runtime.errors import expand_home, run_script


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/data", "{}/data"),
        ("~", "{}"),
        ("--out=~/x.png", "--out={}/x.png"),
        ("--data.path=~/x", "--data.path={}/x"),
        ("iwin:~/run", "iwin:{}/run"),
        ("--extractor=iwin:~/run", "--extractor=iwin:{}/run"),
        (["a", "~/b"], ["a", "{}/b"]),
        *((same, same) for same in ("a/~/b", "a~", "~nobody-of-this-name/x", "~tilde", "", "x=~/y", 3, None)),
    ],
)
def test_what_is_expanded(home, given, expected):
    def filled(value):
        return value.replace("{}", str(home)) if isinstance(value, str) else value

    assert expand_home(given) == (
        [*map(filled, expected)] if isinstance(expected, list) else filled(expected)
    )


def test_recipes_and_their_overrides(home, tmp_path):
    data = {"path": "~/latents", "vae": "~/vae"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"output_dir": "~/runs/a", "data": data}))
    files = ("--config", ROOT / "configs" / "quickstart.yaml", "--config", "r.yaml")
    config, _ = parse_arguments([*files, "--model.init_from=~/b"], Path("r.yaml"), Config)
    found = [config.output_dir, config.data.path, config.data.vae, config.model.init_from]
    assert found == [f"{home}/{name}" for name in ("runs/a", "latents", "vae", "b")]


def test_arguments_of_scripts(home, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--out=~/x", "--class", "3"])
    with pytest.raises(SystemExit):
        run_script(lambda: None)
    assert sys.argv == ["script", f"--out={home}/x", "--class", "3"]


def test_pipelines_in_python(home):
    export_pipeline(make_pipeline(), home / "pipeline", {"step": 1})
    assert loading.load_pipeline("~/pipeline").id2label[1] == "dog"
    assert not Path("~").exists()
