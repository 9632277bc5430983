"""What a run will take, as text: what --dry-run prints."""

from __future__ import annotations

import math
import os
from pathlib import Path

from iwin_dit.build.budget import Budget, device_bytes
from iwin_dit.build.data import count_images
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.data.folders import ignored_line
from iwin_dit.runtime import files, strict_yaml
from iwin_dit.runtime.errors import DataError


def describe_run(budget: Budget) -> str:
    """The resolved config, and what the run takes.

    That is parameters, multiply-adds, tokens, memory, checkpoints, disk and the steps of an epoch.
    """
    config, grid = budget.config, budget.grid
    mixer = config.model.resolved_mixer
    window = f", windows of {' x '.join(map(str, mixer.window(grid)))}" if mixer.reads("window_size") else ""
    ignored = None
    try:
        images, ignored = count_images(config)
        epoch = f"{images / config.train.batch_images:,.1f} steps ({images:,} images)"
    except DataError as error:
        epoch = f"unknown: {error}"
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    needed, least = budget.memory(num_processes), budget.memory(num_processes, least=True)
    size = files.in_units
    parts = ", ".join(f"{name} {size(count)}" for name, count in needed._asdict().items())
    lowest = "" if least == needed else f", or down to {size(least.total)} with smaller micro-batches"
    free = files.free_bytes(Path(config.output_dir))
    device, there = device_bytes()
    lines = {
        "parameters": f"{budget.parameters:,}",
        "multiply-adds per image": f"{budget.multiply_adds / 1e9:,.3f} G, one forward pass",
        "tokens": f"{' x '.join(map(str, grid))} = {math.prod(grid):,}{window}",
        "memory of a device": f"{size(needed.total)} at the peak: {parts}{lowest}; "
        f"{device} has {size(there)}",
        "checkpoint": f"{size(budget.checkpoint_bytes)}, {config.train.keep_checkpoints} are kept",
        "disk": f"{size(budget.disk_bytes)} for the whole run, {size(free)} are free",
        "the whole run": f"{config.train.max_steps:,} steps of {config.train.batch_images:,} images",
        "an epoch": epoch,
        "data": ignored,
    }
    return f"{strict_yaml.dump(config.to_dict())}\n{_table(lines)}"


def describe_classifier(config: ClassifierConfig) -> str:
    """The resolved config of a classifier, and what the run takes."""
    # for this alone: a generator's start need not wait for them
    from iwin_dit.build import classifier_network, labelled

    model = classifier_network.without_content(config)
    parameters = sum(p.numel() for p in model.parameters())
    averages = len(config.ema.decays) + len(config.ema.power_stds)
    checkpoint = 4 * parameters * (3 + averages)
    macs = classifier_network.multiply_adds(model, config)
    unit = "image" if config.data.frames is None else "clip"
    ignored = None
    try:
        source = labelled.open_training(config)
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


def _table(lines: dict[str, str | None]) -> str:
    """A line for each of what there is something to say of."""
    lines = {name: value for name, value in lines.items() if value is not None}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
