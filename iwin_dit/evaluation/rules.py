"""What evaluations can be asked for, and stored results; without torch, so that mistakes show at once."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iwin_dit.config.metrics import chosen_metrics
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import ConfigError

# Options for a model that draws, with what stands in; None: what the model's own recipe says.
RECIPES = (
    *("sampler", "steps", "shift", "guidance", "guidance_scale", "guidance_interval", "guidance_channels"),
    *("guidance_rescale", "internal_guidance", "path_drop", "ema", "ema_std"),
)
DRAWING = dict(num_images=50_000, plan="equal", seed=0, draw_batch=32, compile=False) | dict.fromkeys(
    (*RECIPES, "guide", "save_images", "sweep")
)
SWEEP_TITLE = "a sweep of evaluate_fid.py"  # in the text of its picture
NOT_REPEATED = ("out", "save_images", "save_reference", "repeat", "sweep", "compare")


def check_arguments(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Refuses what cannot be evaluated; sets ``metrics`` and the options of drawing where they are None.

    Args:
        defaults: of all options; ``--repeat`` and ``--compare`` take nothing but these beside them.

    Raises:
        ConfigError: with what was given and what was expected.
    """
    for alone in ("repeat", "compare"):
        if getattr(arguments, alone) is not None:
            for name, value in vars(arguments).items():
                if name != alone and value != defaults[name]:
                    raise ConfigError(f"--{alone} takes no other option; leave {_option(name)} out")
            return
    if arguments.generated is None:
        raise ConfigError("--generated is missing; see --help")
    metrics = None if arguments.metrics is None else arguments.metrics.split(",")
    metrics = chosen_metrics(arguments.extractor, metrics, arguments.inception_weights)
    arguments.metrics = ",".join(metrics)
    for name in ("num_images", "batch_size", "draw_batch", "steps", "workers"):
        least = 0 if name == "workers" else 1
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ConfigError(f"{_option(name)} is {value}, expected at least {least}")
    size = arguments.size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ConfigError(f"--size is {size}, expected a side, or height and width, of at least 1")
    background(arguments.background)
    _check_outputs(arguments)
    _check_drawing(arguments)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Whether the outputs can be written, and what is there was made by an earlier call."""
    kept = arguments.save_reference
    if kept is not None and not kept.endswith(".safetensors"):
        raise ConfigError(f"--save-reference is {kept}, expected a path that ends with .safetensors")
    picture = arguments.sweep and str(Path(arguments.out).with_suffix(".png"))
    paths = {"out": arguments.out, "save_images": arguments.save_images, "save_reference": kept}
    for name, path in (paths | {"sweep": picture}).items():
        if path is None or (name == "save_images" and Path(path).is_file()):  # open_export looks whose it is
            continue
        is_file = name != "save_images" or path.endswith(".npz")
        files.check_writable(Path(path), _option(name), is_file)
        if name != "save_images" and Path(path).exists() and not is_ours(Path(path)):
            raise ConfigError(
                f"{_option(name)} would write over {path}, which was not made by evaluate_fid.py; move it "
                "away, or take another path"
            )


def _check_drawing(arguments: argparse.Namespace) -> None:
    """Sets the options of drawing that are not given, for a model; refuses those that are, for images."""
    there = holds_images(arguments.generated)
    swept = (arguments.sweep or "").partition("=")[0]
    for name, default in DRAWING.items():
        value = getattr(arguments, name)
        is_given = value is not None and value is not False
        if there and is_given:
            raise ConfigError(
                f"{_option(name)} is for what a model draws; {arguments.generated} holds images already: "
                "leave it out"
            )
        if is_given and name == swept:
            raise ConfigError(f"{_option(name)} is {value}, and --sweep gives it too; leave one of them out")
        if not there and not is_given:
            setattr(arguments, name, default)


def holds_images(generated: str) -> bool:
    """Whether ``--generated`` is a set of images or clips, and no model that draws them."""
    path = Path(generated)
    is_model = any((path / name).is_file() for name in ("config.yaml", "model_index.json"))
    if path.exists():
        return not is_model
    from iwin_dit.data.sources import is_packed  # which loads torch

    return is_packed(generated)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def is_ours(path: Path) -> bool:
    """Whether an earlier call wrote a file: statistics, the curve of a sweep, or otherwise a result."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".png":  # says so in its text
                return SWEEP_TITLE.encode() in file.read(limits.HEADER_BYTES)
            if path.suffix != ".safetensors":
                return bool(read_result(path))
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, limits.JSON_BYTES)))
            return "images" in json.loads(header["__metadata__"]["about"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_result(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        ConfigError: where it is missing, is no JSON or has not the parts of a result.
    """
    try:
        result = files.read_json(path, limits.JSON_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a result of --out") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no result of evaluate_fid.py: {error}") from None
    parts = [result.get(key) if isinstance(result, dict) else None for key in ("arguments", "figures")]
    if not all(isinstance(part, dict) and part for part in parts):
        raise ConfigError(f"{path} is no result of evaluate_fid.py: expected arguments and figures in it")
    if not all(isinstance(figure, int | float) for figure in result["figures"].values()):
        raise ConfigError(f"{path} is no result of evaluate_fid.py: its figures are not all numbers")
    return result


def stored_command(result: Mapping[str, Any]) -> list[str]:
    """The command line that a result was made by, but for where to write."""
    made = result.get("generated")
    drawn = isinstance(made, dict) and "model" in made
    # results of images that were there held the options of drawing, too, before these were refused
    left_out = DRAWING if isinstance(made, dict) and not drawn else ()
    command = []
    for key, value in result["arguments"].items():
        if key == "guidance_channels" and value is None and drawn:
            value = "all"  # which version 0.1 wrote as null
        if value is None or value is False or key in NOT_REPEATED or key in left_out:
            continue
        option = _option(key)
        if value is True:
            command.append(option)
        else:
            command += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return command


def show(rows: Mapping[str, Mapping[str, float]], lines: Sequence[str] = ()) -> None:
    """Figures as a table, a row for each evaluation, and lines below; by the main process alone."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for title, figures in rows.items():
        cells = [f"{figures[name]:.6g}" if name in figures else "" for name in names]
        print(f"| {title} | {' | '.join(cells)} |")
    for line in lines:
        print(line)


def differences(stored: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """How a result and its repetition differ, a line for each finding; the last is of the figures."""
    lines = [
        f"the {part} has changed: its hash is another"
        for part in ("generated", "reference", "extractor")
        if _sha256(stored.get(part)) != _sha256(again.get(part))
    ]
    largest = 0.0
    for name, value in again["figures"].items():
        other = stored["figures"].get(name, math.nan)
        if value != other:
            largest = max(largest, abs(value - other) / max(abs(value), abs(other), 1e-12))
    return [*lines, f"largest relative difference {largest:.1e}"]


def _sha256(part: Any) -> Any:
    return part.get("sha256") if isinstance(part, dict) else None
