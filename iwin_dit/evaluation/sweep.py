"""Evaluations over the values of one option, as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iwin_dit.evaluation.rules import SWEEP_TITLE
from iwin_dit.runtime.errors import ConfigError


def values_of(sweep: str, kinds: Mapping[str, Callable[[str], Any]]) -> tuple[str, list[Any]]:
    """``guidance_scale=1,1.5`` as its key and values.

    Raises:
        ConfigError: for another key, or a value that is no finite number, no count of steps, or there twice.
    """
    key, _, text = sweep.partition("=")
    try:
        values = [kinds[key](value) for value in text.split(",")]
    except (KeyError, ValueError):
        values = []
    if not values or not all(map(math.isfinite, values)):
        expected = " or ".join(f"{name}=V1,V2" for name in kinds)
        raise ConfigError(f"--sweep is {sweep!r}, expected {expected} with numbers")
    if key == "steps" and min(values) < 1:
        raise ConfigError(f"--sweep is {sweep!r}, expected steps of at least 1")
    if len(set(values)) < len(values):
        raise ConfigError(f"--sweep is {sweep!r}, expected each value once")
    return key, values


def named(path: str | None, key: str, value: Any) -> str | None:
    """Where the evaluation of one value writes: ``result.json`` as ``result.guidance_scale-1.5.json``."""
    if path is None:
        return None
    whole = Path(path)
    return str(whole.with_name(f"{whole.stem}.{key}-{value}{whole.suffix}"))


def draw_sweep(key: str, values: Sequence[float], figures: Sequence[Mapping[str, float]], path: Path) -> None:
    """A curve for each metric over the values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in figures[0] if "_std" not in name]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3), layout="constrained", squeeze=False
    )
    for panel, name in zip(axes[0], names, strict=True):
        panel.plot(values, [row[name] for row in figures], marker="o")
        panel.set(xlabel=key.replace("_", " "), title=name)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Title": SWEEP_TITLE})
    plt.close(figure)
