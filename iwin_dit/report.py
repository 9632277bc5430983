"""What a run will take, and how it went: text before, a curve after."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import yaml

from iwin_dit import budget
from iwin_dit.build import build_model
from iwin_dit.build_data import count_images
from iwin_dit.config import Config
from iwin_dit.runtime import files
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
    mixer = config.model.mixer
    window = f", windows of {' x '.join(map(str, mixer.window(grid)))}" if mixer.name == "iwin" else ""
    try:
        images = count_images(config)
        epoch = f"{images / config.train.batch_images:,.1f} steps ({images:,} images)"
    except DataError as error:
        epoch = f"unknown: {error}"
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    needed = budget.memory(config, num_processes)
    size = files.in_units
    parts = ", ".join(f"{name} {size(count)}" for name, count in needed._asdict().items())
    free = files.free_bytes(Path(config.output_dir))
    device, there = budget.device_bytes()
    lines = {
        "parameters": f"{parameters:,}",
        "multiply-adds per image": f"{budget.multiply_adds(model) / 1e9:,.3f} G, one forward pass",
        "tokens": f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]}{window}",
        "memory of a device": f"{size(needed.total)} at the peak: {parts}; {device} has {size(there)}",
        "checkpoint": f"{size(budget.checkpoint_bytes(config))}, {config.train.keep_checkpoints} are kept",
        "disk": f"{size(budget.disk_bytes(config))} for the whole run, {size(free)} are free",
        "the whole run": f"{config.train.max_steps:,} steps of {config.train.batch_images:,} images",
        "an epoch": epoch,
    }
    width = max(map(len, lines))
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
    return f"{yaml.safe_dump(config.to_dict(), sort_keys=False)}\n{table}"


def draw_loss_curve(run: RunDirectory) -> Path | None:
    """``loss.png`` from the log; None, and a hint, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        say("no loss curve: it needs matplotlib, pip install 'iwin-dit[demo]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = run.read_log()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    axes.plot(steps, losses, color="0.8", label="each log line")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="running mean")
    axes.set(xlabel="step", ylabel="loss", title=run.path.name)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = run.path / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _smooth(values: list[float], reach: int = 5) -> list[float]:
    """The mean of each value and up to ``reach`` on both sides."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
