"""What a run will take, and how it went: text before, a curve and pictures after."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from iwin_dit import budget
from iwin_dit.build import build_model
from iwin_dit.build_data import count_images
from iwin_dit.classifier_config import ClassifierConfig
from iwin_dit.config import Config
from iwin_dit.data.folders import ignored_line
from iwin_dit.pipelines.lettering import font_for
from iwin_dit.runtime import files, strict_yaml
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import RunDirectory


def describe_run(config: Config) -> str:
    """The resolved config, and what the run takes.

    That is parameters, multiply-adds, tokens, memory, checkpoints, disk and the steps of an epoch.
    """
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    grid = model.grid(*model.latent_size)
    mixer = config.model.resolved_mixer
    window = f", windows of {' x '.join(map(str, mixer.window(grid)))}" if mixer.has_windows else ""
    ignored = None
    try:
        images, ignored = count_images(config)
        epoch = f"{images / config.train.batch_images:,.1f} steps ({images:,} images)"
    except DataError as error:
        epoch = f"unknown: {error}"
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    saved = budget.activations(config)
    needed = budget.memory(config, num_processes, saved)
    least = budget.memory(budget.at_least(config), num_processes, saved)
    size = files.in_units
    parts = ", ".join(f"{name} {size(count)}" for name, count in needed._asdict().items())
    lowest = "" if least == needed else f", or down to {size(least.total)} with smaller micro-batches"
    free = files.free_bytes(Path(config.output_dir))
    device, there = budget.device_bytes()
    lines = {
        "parameters": f"{parameters:,}",
        "multiply-adds per image": f"{budget.multiply_adds(model) / 1e9:,.3f} G, one forward pass",
        "tokens": f"{' x '.join(map(str, grid))} = {math.prod(grid):,}{window}",
        "memory of a device": f"{size(needed.total)} at the peak: {parts}{lowest}; "
        f"{device} has {size(there)}",
        "checkpoint": f"{size(budget.checkpoint_bytes(config))}, {config.train.keep_checkpoints} are kept",
        "disk": f"{size(budget.disk_bytes(config))} for the whole run, {size(free)} are free",
        "the whole run": f"{config.train.max_steps:,} steps of {config.train.batch_images:,} images",
        "an epoch": epoch,
        "data": ignored,
    }
    return f"{strict_yaml.dump(config.to_dict())}\n{_table(lines)}"


def describe_classifier(config: ClassifierConfig) -> str:
    """The resolved config of a classifier, and what the run takes."""
    # for this alone: a generator's start need not wait for them
    from iwin_dit import build_classifier, build_labelled

    model = build_classifier.without_content(config)
    parameters = sum(p.numel() for p in model.parameters())
    averages = len(config.ema.decays) + len(config.ema.power_stds)
    checkpoint = 4 * parameters * (3 + averages)
    macs = build_classifier.multiply_adds(config)
    unit = "image" if config.data.frames is None else "clip"
    ignored = None
    try:
        source = build_labelled.open_training(config)
        images, ignored = len(source), ignored_line(config.data.path, f"{unit}s", source.ignored)
        epoch = f"{images / config.train.batch_images:,.1f} steps ({images:,} {unit}s)"
    except DataError as error:
        epoch = f"unknown: {error}"
    size = files.in_units
    free = files.free_bytes(Path(config.output_dir))
    lines = {
        "parameters": f"{parameters:,}",
        f"multiply-adds per {unit}": f"{macs / 1e9:,.3f} G, one forward pass",
        "checkpoint": f"{size(checkpoint)}, {config.train.keep_checkpoints} are kept, {size(free)} are free",
        "the whole run": f"{config.train.max_steps:,} steps of {config.train.batch_images:,} {unit}s",
        "an epoch": epoch,
        "data": ignored,
    }
    return f"{strict_yaml.dump(config.to_dict())}\n{_table(lines)}"


def draw_loss_curve(run: RunDirectory) -> Path | None:
    """``loss.png`` from the log, figures of evaluations beside it; None, and a hint, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        say("no loss curve: it needs matplotlib, pip install 'iwin-dit[demo]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = run.read_log()
    logged = [r for r in records if r.get("loss") is not None]
    figures = [r for r in records if "evaluated" in r]
    names = [name for name in (figures[-1] if figures else {}) if name not in ("step", "evaluated")]
    figure, axes = plt.subplots(
        1, 1 + len(names), figsize=(7 + 4 * len(names), 4), layout="constrained", squeeze=False
    )
    steps, losses = [r["step"] for r in logged], [r["loss"] for r in logged]
    axes[0, 0].plot(steps, losses, color="0.8", label="each log line")
    axes[0, 0].plot(steps, _smooth(losses), color="tab:blue", label="running mean")
    axes[0, 0].set(xlabel="step", ylabel="loss", title=run.path.name)
    axes[0, 0].legend(frameon=False)
    for panel, name in zip(axes[0, 1:], names, strict=True):
        shown = [r for r in figures if name in r]
        panel.plot([r["step"] for r in shown], [r[name] for r in shown], marker="o", color="tab:blue")
        panel.set(xlabel="step", title=name)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    path = run.path / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _table(lines: dict[str, str | None]) -> str:
    """A line for each of what there is something to say of."""
    lines = {name: value for name, value in lines.items() if value is not None}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _smooth(values: list[float], reach: int = 5) -> list[float]:
    """The mean of each value and up to ``reach`` on both sides."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_predictions(
    images: Sequence[np.ndarray], labels: Sequence[int], predictions: Sequence[int], names: Sequence[str]
) -> Image.Image:
    """Images ``(H, W, 3)`` uint8, each over the class that was found: green if right, red if wrong.

    Where no font here has the letters of a name, the class's number stands for it.
    """
    columns = 8
    side, gap, text = 96, 8, 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, label, found) in enumerate(zip(images, labels, predictions, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        words = names[found] if found == label else f"{names[found]}, not {names[label]}"
        font = font_for(words, 10)
        if font is None:
            words, font = (str(found) if found == label else f"{found}, not {label}"), font_for("0", 10)
        draw.text((x, y + side), words[:16], fill="green" if found == label else "red", font=font)
    return sheet
