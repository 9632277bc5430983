"""What a mixer costs: parameters, multiply-adds, memory and time of a training step, and time to sample."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from iwin_dit.build import budget
from iwin_dit.build.alignment import Alignment
from iwin_dit.build.network import build_model, build_objective
from iwin_dit.config.schema import Config
from iwin_dit.data.latents import LatentDataset
from iwin_dit.layers.sparse import thinned
from iwin_dit.runtime.processes import cores
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import generator
from iwin_dit.training.ema import make_ema
from iwin_dit.training.optimizer import build_optimizer, parameter_groups
from studies.connectivity import blocks_to_connect


def costs(config: Config) -> dict[str, Any]:
    """``parameters``, ``multiply_adds`` of a forward pass on one image, ``memory_bytes`` of
    :func:`training_memory`, and ``blocks`` until every token depends on every other, None for never.
    """
    with torch.device("meta"):
        model = build_model(config)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": budget.multiply_adds(model),
        "memory_bytes": training_memory(config),
        "blocks": blocks_to_connect(model.blocks[0].spec, config.model.grid),
    }


def training_memory(config: Config) -> int:
    """Bytes of tensors at the peak of a training step on a CPU, above weights, gradients and AdamW's moments.

    Counted by PyTorch's allocator, so that it does not depend on the machine's state.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports on the terminal
    step = training_step(config)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def training_step(config: Config) -> Callable[[], None]:
    """Forward, backward and update on one random batch of the config's size; gradients are kept."""
    model, objective = build_model(config).train(), build_objective(config)
    folder = config.alignment.features
    features = None if folder is None else LatentDataset(folder)
    alignment = None
    if config.alignment.teacher is not None:  # features that are stored, or the run's own average
        alignment = Alignment(config, model, objective, Accelerator(), features)
    options = config.optimizer
    optimizer = build_optimizer(model, parameter_groups(model, options.weight_decay), options)
    rng, images = generator(0, "step"), config.train.batch_images
    shape = (images, config.model.in_channels, *model.latent_size)
    x0, noise = (torch.randn(shape, generator=rng) for _ in range(2))
    labels, u = torch.zeros(images, dtype=torch.long), torch.rand(images, generator=rng)
    called = model if config.model.dense_blocks is None else thinned(model, u, config.model.middle_dropout)
    loss = partial(objective.loss, called)
    if alignment is not None:
        alignment.begin_step(make_ema(model), 0)
        shown = x0 if features is None else torch.randn(images, *features.latent_shape, generator=rng)
        loss = partial(alignment.loss, model, shown)

    def step() -> None:
        loss(x0, labels, noise, u).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def train_in_turn(configs: Mapping[str, Config], rounds: int) -> dict[str, float]:
    """Seconds of a training step of each: the median over rounds in which all take one in turn.

    Of a noisy machine, or of runs that were trained at different times, the log would tell less.
    """
    steps = {name: training_step(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with progress(total=(rounds + 1) * len(steps), unit="step", desc="training time") as bar:
        for _ in range(rounds + 1):  # the first warms up
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - began)
                bar.update()
    return {name: median(found[1:]) for name, found in times.items()}


def draw_in_turn(
    pipelines: Mapping[str, Callable[..., Any]], rounds: int, **options: Any
) -> dict[str, tuple[float, list[Image.Image]]]:
    """Seconds per image of each pipeline, and images of the first ten classes from the same noise.

    The time is the median over rounds in which all draw ten images in turn.

    Args:
        options: arguments of the pipelines' call.
    """
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    images = {}
    with progress(total=(rounds + 1) * len(pipelines), unit="draw", desc="sampling time") as bar:
        for _ in range(rounds + 1):  # the first warms up
            for name, pipeline in pipelines.items():
                rng, began = generator(0, "in turn"), time.perf_counter()
                images[name] = pipeline(list(range(10)), generator=rng, **options).images
                times[name].append((time.perf_counter() - began) / 10)
                bar.update()
    return {name: (median(times[name][1:]), images[name]) for name in pipelines}


def machine() -> str:
    """The processor and the versions that times depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cards = [torch.cuda.get_device_name(0)] if torch.cuda.is_available() else []
    return f"{', '.join([*cards, name])}, {cores()} threads, PyTorch {torch.__version__}"
