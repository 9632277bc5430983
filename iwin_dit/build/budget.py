"""What a run takes: memory of a device by part, bytes on disk, operations. Computed, nothing is allocated."""

from __future__ import annotations

import copy
import math
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.build.network import build_model
from iwin_dit.config.classifier import Recipe
from iwin_dit.config.common import OptimizerConfig
from iwin_dit.config.rules import local_batch
from iwin_dit.config.schema import Config
from iwin_dit.layers.sparse import group_sides
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.files import in_units
from iwin_dit.training.muon import stacked_matrices


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


def multiply_adds(
    model: IwinDiTTransformer2DModel, num_blocks: int | None = None, thinned: bool = False
) -> int:
    """Multiply-adds of one forward pass of one image, counted operation by operation on a meta copy.

    Args:
        num_blocks: of a pass that ends after so many.
        thinned: blocks between the dense ones see one token of each group.
    """
    latent = torch.empty(1, model.config.in_channels, *model.latent_size, device="meta")
    label = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        time = torch.zeros(1, device="meta")
        model(latent, time, label, num_blocks=num_blocks, kept=time if thinned else None)
    return counter.get_total_flops() // 2


class Budget:
    """What a run of a recipe takes. The network is built once, without content.

    parameters: of the network; grid: its tokens per axis.
    """

    def __init__(self, config: Config):
        self.config = config
        with torch.device("meta"):
            self.model = build_model(config)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.grid = self.model.grid(*self.model.latent_size)

    @cached_property
    def multiply_adds(self) -> int:
        """Of one forward pass of one image."""
        return multiply_adds(self.model)

    @property
    def training_flops(self) -> int:
        """Operations of a training step on one image: a forward pass, and twice that backward.

        The average that teaches goes through its first blocks; networks of images are not counted.
        """
        thinned, options = self.config.model.dense_blocks is not None, self.config.alignment
        own = 6 * (multiply_adds(self.model, thinned=thinned) if thinned else self.multiply_adds)
        if options.teacher != "self":
            return own
        return own + 2 * multiply_adds(self.model, options.blocks(self.config.model.shape[0])[1])

    @cached_property
    def activations(self) -> Activations:
        """Counts what autograd saves, in forward passes of one and of two images on tensors without content.

        The blocks of a model are alike, two by two: four of them tell of any number.
        """
        depth, model = len(self.model.blocks), copy.deepcopy(self.model)
        if model.sparse is None:  # else they are not alike
            model.blocks = model.blocks[: min(depth, 4 + depth % 2)]
        blocks = model.blocks
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")  # whose autocast is counted, too; the meta device has none
            more = _activations(model, self.config)
            if depth <= 4 or model.sparse is not None:
                return more
            model.blocks = blocks[:-2]
            part = _activations(model, self.config)
        pairs = (depth - 2 - depth % 2) // 2
        fixed, image = (a + pairs * (b - a) for a, b in zip(part[:2], more[:2], strict=True))
        return Activations(fixed, image, part.block, part.block_input)

    def memory(self, num_processes: int = 1, least: bool = False) -> Memory:
        """Of one device at its peak: the end of the forward pass, or of a checkpointed block's backward pass.

        Args:
            least: with the smallest micro-batch that the recipe allows: ``auto`` goes down to one image.
        """
        config, saved = self.config, self.activations
        parts = num_processes if config.train.sharding == "fsdp2" else 1
        averages = 0 if config.ema.on_cpu else config.ema.averages
        _, images = local_batch(config.train, num_processes)
        if least and config.train.micro_batch == "auto":
            images = 1
        kept = images * saved.image
        if every := config.train.gradient_checkpointing:
            blocks = sum(self._share_of_tokens(i) for i in range(0, config.model.shape[0], every))
            kept -= int(images * (blocks * (saved.block - saved.block_input) - saved.block))
        size = 4 * self.parameters // parts
        return Memory(
            size,
            averages * size,
            size,
            state_bytes(self.model, config.optimizer) // parts,
            saved.fixed + kept,
        )

    def _share_of_tokens(self, block: int) -> float:
        """That a block sees in the dearest step."""
        thinned = self.config.model.dense_from_step is None and block in self.model.middle
        return 1 / math.prod(group_sides(self.grid)) if thinned else 1.0

    @property
    def disk_bytes(self) -> int:
        """Of a whole run: the checkpoints that are kept and one being written, snapshots, the pipeline."""
        ema, train = self.config.ema, self.config.train
        every = ema.snapshot_every_steps
        snapshots = train.max_steps // every * len(ema.power_stds) if every else 0
        checkpoints = checkpoint_bytes(self.model, self.config) * (train.keep_checkpoints + 1)
        return checkpoints + 4 * self.parameters * (snapshots + 1)

    def check(self) -> None:
        """Refuses a run that cannot work here: on this card, on this disk.

        Raises:
            ConfigError: where memory or disk do not suffice, with what is needed, what there is, what helps.
        """
        config, (name, there) = self.config, device_bytes()
        needed = self.memory(int(os.environ.get("WORLD_SIZE", "1")), least=True)
        if torch.cuda.is_available() and needed.total > there:
            lower = "" if config.train.micro_batch == "auto" else "lower train.micro_batch, or "
            raise ConfigError(
                f"the run takes {in_units(needed.total)} of memory, {name} has {in_units(there)}; {lower}set "
                "train.gradient_checkpointing 1, and ema.on_cpu true or train.sharding fsdp2"
            )
        root = Path(config.output_dir).absolute()
        has = sum(file.stat().st_size for file in root.rglob("*.safetensors")) if root.exists() else 0
        free = files.free_bytes(root)
        if self.disk_bytes - has > free:
            raise ConfigError(
                f"the run writes {in_units(self.disk_bytes)} to {config.output_dir}, where "
                f"{in_units(free)} are free; lower train.keep_checkpoints, raise ema.snapshot_every_steps, "
                "or take another disk"
            )


def state_bytes(model: nn.Module, options: OptimizerConfig) -> int:
    """Of the optimiser: two numbers for each parameter, one where Muon moves it."""
    numbers = 2 * sum(parameter.numel() for parameter in model.parameters())
    if options.name == "muon":
        numbers -= sum(matrix.numel() for matrix in stacked_matrices(model))
    return 4 * numbers


def checkpoint_bytes(model: nn.Module, config: Recipe) -> int:
    """Of one checkpoint: weights, averages and the optimiser's state."""
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return weights * (1 + config.ema.averages) + state_bytes(model, config.optimizer)


def device_bytes() -> tuple[str, int]:
    """The device that training would take here, and its memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return "this machine", psutil.virtual_memory().total


def _activations(model: IwinDiTTransformer2DModel, config: Config) -> Activations:
    """Of a model on tensors without content."""
    counts = [_saved_bytes(model, config, images) for images in (1, 2)]
    blocks = [_saved_bytes(model, config, images, only_block=True) for images in (1, 2)]
    tokens, width = math.prod(model.grid(*model.latent_size)), config.model.shape[1]
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
        if only_block:
            output = model.blocks[0](x, condition, None)
        elif model.sparse is None:
            output = model(latents, times, labels)
        else:  # in its dearest step
            choice = times if config.model.dense_from_step is None else None
            output = model(latents, times, labels, kept=choice, skip_middle=labels > 0)
        del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
