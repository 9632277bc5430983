"""Configs: strict YAML, overrides from the command line, and errors that say what to do.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from iwin_dit.config_schema import Config
from iwin_dit.runtime.errors import ConfigError

T = TypeVar("T")  # Config, or ClassifierConfig


def parse_arguments(arguments: Sequence[str], default: Path, kind: type[T] = Config) -> tuple[T, bool]:
    """The checked config, and whether ``--dry-run`` was asked for.

    Args:
        arguments: ``--config FILE``, ``--dry-run`` and overrides such as ``--train.max_steps 100``.
        default: the recipe when no ``--config`` is given.
        kind: the dataclass of the recipe.

    Raises:
        ConfigError: naming the key, what was found, what was expected and the nearest name.
    """
    parser = _parser(kind)
    arguments = list(arguments)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = ["--config", str(default), *arguments]
    for file in _config_files(arguments):
        check_keys(load_yaml(file), kind, str(file))
    parsed = _parse(parser, arguments)
    dry_run = parsed.pop("dry_run")
    parsed.pop("config")
    try:
        built = parser.instantiate(parsed)
    except ValueError as error:  # a spec that contradicts itself says so when it is made
        raise ConfigError(f"model: {error}") from None
    config = kind(**{f.name: built[f.name] for f in fields(kind)})
    config.check()
    return config, dry_run


def load_config(path: Path, kind: type[T] = Config) -> T:
    """A checked config from a file."""
    return parse_arguments(["--config", str(path)], path, kind)[0]


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; a key that appears twice is an error, not the last one silently."""
    try:
        with open(path) as file:
            content = yaml.load(file, _StrictLoader)
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected keys and values")
    return content


class _StrictLoader(yaml.SafeLoader):
    pass


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.YAMLError(
                f"the key {key.value} appears twice, again in line {key.start_mark.line + 1}"
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def check_keys(content: dict[str, Any], kind: type, where: str, prefix: str = "") -> None:
    """Every key of a file must be a field of the config, at its level."""
    known = {f.name: f for f in fields(kind)}
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{where}: {prefix}{key} is not a key; {_did_you_mean(prefix, key, known)}")
        nested = known[key].default_factory
        if isinstance(nested, type) and is_dataclass(nested):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}: {prefix}{key} is {value!r}, expected keys such as {_some(nested)}"
                )
            check_keys(value, nested, where, f"{prefix}{key}.")


def _did_you_mean(prefix: str, key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"


def _some(kind: type) -> str:
    return ", ".join(f.name for f in fields(kind)[:3])


def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(
        description="Trains on the recipe of --config. Without arguments: the quickstart.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a recipe from configs/ or your own")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and stop")
    parser.add_class_arguments(kind, None)
    return parser


def _config_files(arguments: list[str]) -> list[str]:
    files = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    return files + [after for a, after in pairwise(arguments) if a == "--config"]


def _parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    try:
        return parser.parse_args(arguments)
    except Exception as error:  # jsonargparse raises several kinds, all of them the user's mistake here
        message = _readable(" ".join(str(error).split()))
        if "unrecognized arguments" in message:
            unknown = next((a for a in arguments if a.startswith("--") and a in message), "")
            options = [option for action in parser._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown.partition("=")[0], options, n=1)
            message += f"; did you mean {near[0]}?" if near else "; see --help"
        raise ConfigError(message) from None


def _readable(message: str) -> str:
    """jsonargparse's type errors in the words of this project: key, found, expected."""
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    found = re.search(r"(?:Got|Given) value: (.*)$", message)
    expected = re.search(r"Subtypes: \[(.*?)\] Errors|Expected a (.*?)\. Got value", message)
    if not (key and found and expected):
        return message
    kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", expected.group(1) or expected.group(2))
    return f"{key.group(1)} is {found.group(1)!r}, expected {kind.replace(', NoneType', ' or nothing')}"
