"""What a run will take, as text: what --dry-run prints."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from iwin_dit.build.budget import Budget, checkpoint_bytes, device_bytes
from iwin_dit.build.data import count_images, open_training
from iwin_dit.config.classifier import ClassifierConfig, Recipe
from iwin_dit.data.folders import ignored_line
from iwin_dit.runtime import files, strict_yaml
from iwin_dit.runtime.errors import DataError


def describe_run(budget: Budget) -> str:
    """The resolved config, and what the run takes.

    That is parameters, multiply-adds, tokens, memory, checkpoints, disk and the steps of an epoch.
    """
    config, grid, size = budget.config, budget.grid, files.in_units
    mixer = config.model.resolved_mixer
    window = f", windows of {' x '.join(map(str, mixer.window(grid)))}" if mixer.reads("window_size") else ""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    needed, least = budget.memory(num_processes), budget.memory(num_processes, least=True)
    parts = ", ".join(f"{name} {size(count)}" for name, count in needed._asdict().items())
    lowest = "" if least == needed else f", or down to {size(least.total)} with smaller micro-batches"
    device, there = device_bytes()
    more = {
        "tokens": f"{' x '.join(map(str, grid))} = {math.prod(grid):,}{window}",
        "memory of a device": f"{size(needed.total)} at the peak: {parts}{lowest}; "
        f"{device} has {size(there)}",
        "disk": f"{size(budget.disk_bytes)} for the whole run",
    }
    return _describe(config, "image", budget.model, budget.multiply_adds, count_images, more)


def describe_classifier(config: ClassifierConfig) -> str:
    """The resolved config of a classifier, and what the run takes."""
    # for this alone: a generator's start need not wait for them
    from iwin_dit.build import classifier_network

    model = classifier_network.without_content(config)
    unit = "image" if config.data.frames is None else "clip"

    def count(config: ClassifierConfig) -> tuple[int, str | None]:
        source = open_training(config)
        return len(source), ignored_line(config.data.path, f"{unit}s", source.ignored)

    return _describe(config, unit, model, classifier_network.multiply_adds(model, config), count, {})


def _describe(
    config: Recipe, unit: str, model: nn.Module, multiply_adds: int, count: Callable, more: dict[str, str]
) -> str:
    """The resolved config, and a line for each of what there is something to say of."""
    try:
        images, ignored = count(config)
        epoch = f"{images / config.train.batch_images:,.1f} steps ({images:,} {unit}s)"
    except DataError as error:
        epoch, ignored = f"unknown: {error}", None
    free = files.free_bytes(Path(config.output_dir))
    checkpoint = checkpoint_bytes(model, config)
    lines = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        f"multiply-adds per {unit}": f"{multiply_adds / 1e9:,.3f} G, one forward pass",
        **more,
        "checkpoint": f"{files.in_units(checkpoint)}, {config.train.keep_checkpoints} are kept, "
        f"{files.in_units(free)} are free",
        "the whole run": f"{config.train.max_steps:,} steps of {config.train.batch_images:,} {unit}s",
        "an epoch": epoch,
        **({} if ignored is None else {"data": ignored}),
    }
    width = max(map(len, lines))
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
    return f"{strict_yaml.dump(config.to_dict())}\n{table}"
