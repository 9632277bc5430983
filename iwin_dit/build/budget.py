"""What a run takes: memory of a device by part, bytes on disk, operations. Computed, nothing is allocated."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.build.network import build_model
from iwin_dit.config.rules import local_batch
from iwin_dit.config.schema import Config
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.files import in_units


class Memory(NamedTuple):
    """Bytes on one device while training."""

    weights: int
    ema: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class Activations(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass.

    fixed: whatever the images (the copies of the weights that autocast makes); image: of each image, without
    gradient checkpointing; block: of these, one block's; block_input: one block's input.
    """

    fixed: int
    image: int
    block: int
    block_input: int


def multiply_adds(model: IwinDiTTransformer2DModel) -> int:
    """Multiply-adds of one forward pass of one image, counted operation by operation on a meta copy."""
    latent = torch.empty(1, model.config.in_channels, *model.latent_size, device="meta")
    label = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latent, torch.zeros(1, device="meta"), label)
    return counter.get_total_flops() // 2


def training_flops(config: Config) -> float:
    """Floating-point operations of a training step on one image: a forward pass, and twice that backward."""
    with torch.device("meta"):
        return 6 * multiply_adds(build_model(config))


def parameter_count(config: Config) -> int:
    """Of the network."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def activations(config: Config) -> Activations:
    """Counts what autograd saves, in forward passes of one and of two images on tensors without content.

    The blocks of a model are alike, two by two: four of them tell of any number.
    """
    depth, width, heads, patch_size = config.model.shape
    if depth <= 4:
        return _activations(config)
    shape = dict(size=None, width=width, heads=heads, patch_size=patch_size)
    part, more = (
        _activations(replace(config, model=replace(config.model, **shape, depth=number)))
        for number in (2 + depth % 2, 4 + depth % 2)
    )
    pairs = (depth - 2 - depth % 2) // 2
    fixed, image = (a + pairs * (b - a) for a, b in zip(part[:2], more[:2], strict=True))
    return Activations(fixed, image, *part[2:])


def _activations(config: Config) -> Activations:
    with FakeTensorMode():
        model = build_model(config)
        counts = [_saved_bytes(model, config, images) for images in (1, 2)]
        grid = model.grid(*model.latent_size)
        tokens, width = math.prod(grid), config.model.shape[1]
        blocks = [_saved_bytes(model, config, images, only_block=True) for images in (1, 2)]
    image = counts[1] - counts[0]
    return Activations(counts[0] - image, image, blocks[1] - blocks[0], 4 * tokens * width)


def _saved_bytes(
    model: IwinDiTTransformer2DModel, config: Config, images: int, only_block: bool = False
) -> int:
    """Bytes of the storages that autograd keeps, parameters left out."""
    latents = torch.randn(images, config.model.in_channels, *model.latent_size)
    condition = torch.randn(images, config.model.shape[1])
    grid = model.grid(*model.latent_size)
    x = torch.randn(images, *grid, config.model.shape[1], requires_grad=True)
    labels, times = torch.zeros(images, dtype=torch.long), torch.zeros(images)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = model.blocks[0](x, condition, None) if only_block else model(latents, times, labels)
        del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory(config: Config, num_processes: int = 1, saved: Activations | None = None) -> Memory:
    """Of one device, at the peak: the end of the forward pass, or the backward pass of a checkpointed block.

    Args:
        saved: what :func:`activations` found; it does not depend on batch or levers.
    """
    saved = saved or activations(config)
    parameters = parameter_count(config)
    parts = num_processes if config.train.sharding == "fsdp2" else 1
    averages = 0 if config.ema.on_cpu else len(config.ema.decays) + len(config.ema.power_stds)
    _, images = local_batch(config.train, num_processes)
    kept = images * saved.image
    if every := config.train.gradient_checkpointing:
        blocks = -(-config.model.shape[0] // every)
        kept -= images * (blocks * (saved.block - saved.block_input) - saved.block)
    size = 4 * parameters // parts
    return Memory(size, averages * size, size, 2 * size, saved.fixed + kept)


def at_least(config: Config) -> Config:
    """The config with the smallest micro-batch that it allows: ``auto`` goes down to one image."""
    if config.train.micro_batch != "auto":
        return config
    return replace(config, train=replace(config.train, micro_batch=1))


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint: weights, averages and the optimiser's two moments."""
    averages = len(config.ema.decays) + len(config.ema.power_stds)
    return 4 * parameter_count(config) * (3 + averages)


def disk_bytes(config: Config) -> int:
    """Of a whole run: the checkpoints that are kept and one being written, snapshots, the pipeline."""
    weights = 4 * parameter_count(config)
    every = config.ema.snapshot_every_steps
    snapshots = config.train.max_steps // every * len(config.ema.power_stds) if every else 0
    return checkpoint_bytes(config) * (config.train.keep_checkpoints + 1) + weights * (snapshots + 1)


def device_bytes() -> tuple[str, int]:
    """The device that training would take here, and its memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return "this machine", psutil.virtual_memory().total


def check(config: Config) -> None:
    """Refuses a run that cannot work here: on this card, on this disk.

    Raises:
        ConfigError: where memory or disk do not suffice, with what is needed, what is there and what helps.
    """
    name, there = device_bytes()
    needed = memory(at_least(config), int(os.environ.get("WORLD_SIZE", "1")))
    if torch.cuda.is_available() and needed.total > there:
        lower = "" if config.train.micro_batch == "auto" else "lower train.micro_batch, or "
        raise ConfigError(
            f"the run takes {in_units(needed.total)} of memory, {name} has {in_units(there)}; {lower}set "
            "train.gradient_checkpointing 1, and ema.on_cpu true or train.sharding fsdp2"
        )
    root = Path(config.output_dir).absolute()
    has = sum(file.stat().st_size for file in root.rglob("*.safetensors")) if root.exists() else 0
    free = files.free_bytes(root)
    if disk_bytes(config) - has > free:
        raise ConfigError(
            f"the run writes {in_units(disk_bytes(config))} to {config.output_dir}, where "
            f"{in_units(free)} are free; lower train.keep_checkpoints, raise ema.snapshot_every_steps, "
            "or take another disk"
        )
