"""Configs: recipes in YAML, overrides from the command line, and errors that say what to do.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from iwin_dit.config import classifier, rules
from iwin_dit.config.bounds import check_ranges, keys_of
from iwin_dit.config.schema import Config, SampleConfig
from iwin_dit.config.types import build, check_keys, types_of
from iwin_dit.layers.blindness import of_earlier_version
from iwin_dit.runtime import strict_yaml
from iwin_dit.runtime.errors import ConfigError, did_you_mean, expand_home

# A recipe of another program, such as those of examples/, has a method ``check``.
CHECKS: dict[type, Callable[[Any], None]] = {
    Config: rules.check,
    classifier.ClassifierConfig: classifier.check,
}
load_yaml = strict_yaml.load
RECIPES = Path(__file__).parents[1] / "configs"  # in a checkout a link to the folder beside the package


def parse_arguments(
    arguments: Sequence[str], default: str | Path, kind: type[Any] = Config
) -> tuple[Any, bool]:
    """The checked config, and whether ``--dry-run`` was asked for.

    Args:
        arguments: ``--config FILE``, ``--dry-run`` and overrides such as ``--train.max_steps 100``. Of two
            that set the same key, the later one counts.
        default: the recipe when no ``--config`` is given, a path or a name as ``--config`` takes it.
        kind: the dataclass of the recipe.

    Raises:
        ConfigError: naming the key, what was found, what was expected and the nearest name.
    """
    given = list(_options(list(map(str, arguments)), kind))
    names = [name for name, _ in given]
    if "help" in names:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(
            description="Trains on the recipe of --config. Without arguments: the quickstart.",
        )
        parser.add_argument("--config", help="a recipe, or the name of one that comes along: quickstart")
        parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and stop")
        parser.add_class_arguments(kind, None)
        parser.print_help()
        raise SystemExit(0)
    content: dict[str, Any] = {} if "config" in names else _read(str(default), kind)
    for name, value in given:
        if name == "config":
            _merge(content, _read(value, kind), kind)
        elif name != "dry-run":
            _merge(content, _override(name, value, kind), kind)
    config = build(expand_home(content), kind)
    CHECKS[kind](config) if kind in CHECKS else config.check()
    return config, "dry-run" in names


def load_config(path: Path, kind: type[Any] = Config) -> Any:
    """A checked config from a file."""
    return parse_arguments(["--config", str(path)], path, kind)[0]


def load_run(run: Path) -> Config:
    """The config of a run of a generator.

    In one of version 0.1 ``auto`` means what it did there, so that its weights fit; what it built is not
    refused now.
    """
    path = run / "config.yaml"
    if not is_of_earlier_version(load_yaml(path)):
        return load_config(path)
    config, _ = parse_arguments(["--config", str(path), "--model.allow_blind", "true"], path)
    mixer = of_earlier_version(config.model.mixer, config.model.grid)
    return replace(config, model=replace(config.model, mixer=mixer))


def sampling_in(exported: Any) -> SampleConfig:
    """What the recipe beside an exported pipeline says about sampling; the defaults where it says nothing.

    Raises:
        ConfigError: for a key or value that a recipe cannot have.
    """
    config = exported.get("config") if isinstance(exported, dict) else None
    content = config.get("sample") if isinstance(config, dict) else None
    if content is None:
        return SampleConfig()
    check_keys({"sample": content}, Config)
    sample = build(content, SampleConfig, "sample.")
    check_ranges(sample, "sample.")
    return sample


def is_of_earlier_version(content: dict[str, Any]) -> bool:
    """Whether the config of a run was written by version 0.1, which did not know ``model.allow_blind``."""
    model = content.get("model")
    return not isinstance(model, dict) or "allow_blind" not in model


def _read(name: str, kind: type) -> dict[str, Any]:
    path = find_recipe(name, "classifier" if kind is classifier.ClassifierConfig else "")
    content = load_yaml(path)
    check_keys(content, kind, f"{path}: ")
    return content


def find_recipe(name: str | Path, folder: str = "") -> Path:
    """The file of ``--config``: a path, or a recipe of the package such as ``quickstart``, ``compare/iwin``.

    Args:
        folder: of the package's recipes, where a name is looked for, too.

    Raises:
        ConfigError: for a name without an ending that is neither; with the nearest name.
    """
    path = Path(name)
    if path.suffix or path.is_file() or "\0" in str(name):
        return path
    for place in (RECIPES, RECIPES / folder):
        if (found := place / f"{name}.yaml").is_file():
            return found
    known = [str(found.relative_to(RECIPES).with_suffix("")) for found in sorted(RECIPES.rglob("*.yaml"))]
    hint = did_you_mean(str(name), known, "give a path", cutoff=0.4)
    raise ConfigError(f"--config {name} is neither a file nor a recipe that comes with iwin-dit; {hint}")


def _options(arguments: list[str], kind: type) -> Iterator[tuple[str, str]]:
    """Name and value of each argument; those of flags are empty."""
    known = [*(key for key, _ in keys_of(kind)), "config"]
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument in ("--help", "-h"):
            yield "help", ""
        elif argument == "--dry-run":
            yield "dry-run", ""
        elif not argument.startswith("--") or name not in known:
            options = [f"--{key}" for key in (*known, "help", "dry-run")]
            hint = did_you_mean(argument.partition("=")[0], options, "see --help")
            raise ConfigError(f"unrecognized arguments: {argument}; {hint}")
        else:
            if not equals:
                value = next(remaining, "--")
                if value.startswith("--"):
                    raise ConfigError(f"{argument} has no value after it")
            yield name, value


def _override(key: str, text: str, kind: type) -> dict[str, Any]:
    """``a.b`` and its value as the content of a file."""
    *sections, name = key.split(".")
    for section in sections:
        kind = types_of(kind)[section]
    value: Any = text
    if types_of(kind)[name] not in (str, str | None) or text == "null":
        try:
            value = strict_yaml.parse(text)
        except ValueError:
            value = text
    content = {name: value}
    for section in reversed(sections):
        content = {section: content}
    return content


def _merge(content: dict[str, Any], more: dict[str, Any], kind: Any) -> None:
    """Sets keys; of sections, the keys in them."""
    check_keys(more, kind)
    for key, value in more.items():
        if is_dataclass(hint := types_of(kind)[key]):
            _merge(content.setdefault(key, {}), value, hint)
        else:
            content[key] = value
