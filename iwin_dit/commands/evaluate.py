"""Figures of generated images against real ones, with everything that is needed to repeat them.

``iwin-dit evaluate --generated RUN --reference FOLDER``; on several GPUs, ``accelerate launch -m
iwin_dit.commands evaluate``. The same command again goes on after an interruption.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iwin_dit.commands.drawing import add_drawing_options
from iwin_dit.config import metrics
from iwin_dit.evaluation import rules
from iwin_dit.runtime.errors import ConfigError, Parser

SWEEPS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("guidance_scale", "internal_guidance", "shift"), float),
    "steps": int,
}


def parse_arguments(command: Sequence[str] | None = None) -> argparse.Namespace:
    """Those of a command line (default: of the process), checked."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--generated", help="a run, a pipeline or a hub id that draws; or a folder or .npz of images")
    add("--reference", help="a folder or .npz of real images (clips), or stored statistics")
    add(
        "--extractor",
        default="inception",
        help="inception, dinov2[:FILE], efficientnet-lite0[:FILE], iwin:RUN, i3d:FILE (inception)",
    )
    add(
        "--metrics",
        help="; ".join(f"{name}: {','.join(kind.metrics)}" for name, kind in metrics.EXTRACTORS.items()),
    )
    add("--num-images", type=int, help="to draw (50,000)")
    add("--plan", choices=("equal", "uniform"), help="classes in turn, or at random (equal)")
    add("--seed", type=int, help="image k of a class depends on seed, class and k alone (0)")
    add(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="a side, or height and width: images of folders are cropped, as ADM's",
    )
    add("--background", metavar="COLOUR", help="of transparent pixels: white, black or R,G,B")
    add("--follow-links", action="store_true", help="links may lead out of a folder of images")
    add("--workers", type=int, help="processes that read images (4, or as many as there are cores)")
    add("--batch-size", type=int, default=64, help="images of one forward pass (64)")
    add("--draw-batch", type=int, help="images drawn together; a pixel in 10^5 depends on it (32)")
    add("--compile", action="store_true", help="compile the model first: worth it for many images")
    add("--inception-weights", help="torch-fidelity's file, for machines without a network")
    add("--save-images", metavar="PATH", help="keep what is drawn: a folder of PNGs, or an .npz as ADM's")
    add("--save-reference", metavar="PATH", help="keep the reference's statistics, as .safetensors")
    add("--out", default="evaluation.json", help="the result (evaluation.json)")
    add("--repeat", metavar="RESULT", help="run a result's evaluation again, and compare")
    add("--compare", metavar="RESULT", nargs="+", help="print stored results as one table")
    add("--sweep", metavar="KEY=V1,V2", help=f"one evaluation per value of {' or '.join(SWEEPS)}, and a plot")
    add_drawing_options(parser)
    arguments = parser.parse_args(command)
    rules.check_arguments(arguments, {name: parser.get_default(name) for name in vars(arguments)})
    return arguments


def repeat(path: Path) -> None:
    """The evaluation of a stored result again, beside it, and how they differ."""
    from iwin_dit.commands.measure import evaluate

    stored = rules.read_result(path)
    try:
        again = parse_arguments([*rules.stored_command(stored), f"--out={path}.again.json"])
    except ConfigError as error:
        raise ConfigError(f"{path} is no result of this evaluation: {error}") from None
    result = evaluate(again)
    rows = {"stored": stored["figures"], "again": result["figures"]}
    rules.show(rows, rules.differences(stored, result))


def values_of(sweep: str) -> tuple[str, list[Any]]:
    """``guidance_scale=1,1.5`` as its key and values.

    Raises:
        ConfigError: for another key, or a value that is no finite number, no count of steps, or there twice.
    """
    key, _, text = sweep.partition("=")
    try:
        values = [SWEEPS[key](value) for value in text.split(",")]
    except (KeyError, ValueError):
        values = []
    if not values or not all(map(math.isfinite, values)):
        expected = " or ".join(f"{name}=V1,V2" for name in SWEEPS)
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
    figure.savefig(path, dpi=120, metadata={"Title": rules.SWEEP_TITLE})
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    if arguments.repeat is not None:
        repeat(Path(arguments.repeat))
        return
    if arguments.compare is not None:
        rules.show({path: rules.read_result(Path(path))["figures"] for path in arguments.compare})
        return
    from iwin_dit.commands.measure import evaluate

    if arguments.sweep is None:
        rules.show({arguments.generated: evaluate(arguments)["figures"]})
        return
    key, values = values_of(arguments.sweep)
    try:
        import matplotlib  # noqa: F401
    except ImportError:  # found before the work
        raise ConfigError("--sweep needs matplotlib: pip install 'iwin-dit[demo]'") from None
    rows = {}
    for value in values:
        one = argparse.Namespace(**vars(arguments) | {key: value})
        one.out, one.save_images = (named(path, key, value) for path in (one.out, one.save_images))
        rows[f"{key} {value}"] = evaluate(one)["figures"]
    rules.show(rows)
    draw_sweep(key, values, list(rows.values()), Path(arguments.out).with_suffix(".png"))
