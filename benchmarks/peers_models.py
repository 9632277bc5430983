"""The models of :mod:`peers` and their steps, what they multiply and what they keep for backward.

All are called as ``model(latents, timestep, class_labels, return_dict=False)[0]``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import psutil
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.layers.embeddings import PatchEmbed, unpatchify
from iwin_dit.layers.specs import MixerSpec, shape_of
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.runtime.errors import ConfigError

CHANNELS, NUM_CLASSES = 32, 1000
MARGIN = 1.2  # memory: needed over counted


class DoesNotFit(Exception):
    """The step cannot run in the memory that there is."""


@dataclass(frozen=True)
class Shape:
    """What the models have in common."""

    depth: int
    width: int
    heads: int
    patch: int

    @classmethod
    def of(cls, size: str) -> Shape:
        """By name and patch size, such as ``XL/1``; anything else is a ConfigError."""
        try:
            return cls(*shape_of(size))
        except ValueError as error:
            raise ConfigError(f"--size: {error}") from None

    def arguments(self, side: int) -> dict[str, int]:
        """Of a model on ``side x side`` tokens, in the words of diffusers."""
        return dict(
            sample_size=side * self.patch,
            patch_size=self.patch,
            in_channels=CHANNELS,
            num_layers=self.depth,
            num_attention_heads=self.heads,
            attention_head_dim=self.width // self.heads,
        )


def window_of(side: int) -> int:
    """Iwin's automatic window on a square grid of tokens, which Swin and neighbourhoods get too."""
    return MixerSpec().window((side, side))[0]


class SwinStack(nn.Module):
    """timm's Swin blocks on the grid of tokens, every second one shifted, of one width from end to end.

    Unconditional: timestep and labels are ignored, so it has no modulation, whose linear layers are a third
    of a DiT block's weights, though few of its multiply-adds.
    """

    def __init__(self, shape: Shape, side: int):
        super().__init__()
        self.patch, window = shape.patch, window_of(side)
        self.patch_embed = PatchEmbed(CHANNELS, shape.width, shape.patch)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                shape.width,
                (side, side),
                shape.heads,
                window_size=window,
                shift_size=window // 2 if index % 2 else 0,
            )
            for index in range(shape.depth)
        )
        self.norm_out = nn.LayerNorm(shape.width)
        self.proj_out = nn.Linear(shape.width, shape.patch**2 * CHANNELS)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        x = self.patch_embed(hidden_states)  # (B, side, side, D)
        for block in self.blocks:
            x = block(x)
        return (unpatchify(self.proj_out(self.norm_out(x)), self.patch),)


def _ours(mixer: dict, position_embedding: str = "none") -> Callable[[Shape, int], nn.Module]:
    """This project's model with DiT's norm, MLP and gates, so that attention alone differs."""

    def make(shape: Shape, side: int) -> nn.Module:
        return IwinDiTTransformer2DModel(
            **shape.arguments(side),
            num_classes=NUM_CLASSES,
            mixer=mixer,
            position_embedding=position_embedding,
            norm="layer_norm",
            mlp="gelu",
            open_gates=False,
        )

    return make


def _diffusers(shape: Shape, side: int) -> nn.Module:
    """Each of its blocks has an embedding of timestep and label of its own."""
    return DiTTransformer2DModel(
        **shape.arguments(side),
        num_embeds_ada_norm=NUM_CLASSES,
    )


MAKERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "iwin": _ours({"name": "iwin"}),
    "global": _ours({"name": "global"}, "sincos"),
    "diffusers": _diffusers,
    "swin": SwinStack,
    "natten": _ours({"name": "neighborhood"}, "sincos"),
}
VARIANTS = {"iwin_sdpa": "iwin"}  # the same weights, without the kernels of this project
MODELS = ("iwin", *VARIANTS, *list(MAKERS)[1:])


def build(name: str, shape: Shape, side: int) -> nn.Module:
    """The model on the default device, in eval mode: diffusers' would draw a label dropout in each block."""
    return MAKERS[VARIANTS.get(name, name)](shape, side).eval()


def unavailable(name: str, device: str) -> str | None:
    """Why a model cannot run here."""
    if name != "natten":
        return None
    if find_spec("natten") is None:
        return "not installed"
    return "no backward on a CPU" if device == "cpu" else None


def add_noise(model: nn.Module) -> nn.Module:
    """Draws the matrices that start at zero, so that no branch and no gradient is zero."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def inputs(shape: Shape, side: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents ``(B, C, H, W)``, timesteps and labels ``(B,)``, random, on the default device."""
    latents = torch.randn(batch, CHANNELS, side * shape.patch, side * shape.patch)
    return latents, 1000 * torch.rand(batch), torch.randint(NUM_CLASSES, (batch,))


def loss_of(model: nn.Module, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
    """A squared error: the latents stand in for the target."""
    prediction = model(latents, timestep, class_labels, return_dict=False)[0]
    return F.mse_loss(prediction.float(), latents.float())


def multiply_adds(name: str, shape: Shape, side: int) -> int:
    """Of the forward pass of one image, as FlopCounterMode sees them; ask before kernels are selected.

    A neighbourhood counts the keys that it sees: without natten the model attends to all, and masks.
    """

    def count(shape: Shape) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            build(name, shape, side)(*inputs(shape, side, 1), return_dict=False)
        return counter.get_total_flops() // 2

    counted = at_full_depth(count, shape)
    if name == "natten":
        (seen, _), tokens = MixerSpec("neighborhood").window((side, side)), side**2
        counted -= shape.depth * 2 * shape.width * tokens * (tokens - seen**2)
    return counted


def at_full_depth(count: Callable[[Shape], int], shape: Shape) -> int:
    """``count(shape)`` from those of two and four blocks: of all models every second block is alike."""
    two, four = (count(replace(shape, depth=depth)) for depth in (2, 4))
    return two + (shape.depth - 2) * (four - two) // 2


def bytes_of(model: nn.Module) -> int:
    """Of weights and buffers."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def weight_bytes(name: str, shape: Shape, side: int) -> int:
    """Of weights and buffers in float32."""

    def count(shape: Shape) -> int:
        with torch.device("meta"):
            return bytes_of(build(name, shape, side))

    return at_full_depth(count, shape)


def saved_bytes(name: str, shape: Shape, side: int, batch: int, bf16: bool) -> int:
    """What a forward pass on a CPU keeps for backward; nothing is computed."""

    def count(shape: Shape) -> int:
        with FakeTensorMode():
            model, arguments = build(name, shape, side), inputs(shape, side, batch)
            return _saved_bytes(model, arguments, bf16)

    return at_full_depth(count, shape)


def _saved_bytes(model: nn.Module, arguments: tuple[Tensor, ...], bf16: bool) -> int:
    storages = {t.untyped_storage()._cdata: None for t in [*model.parameters(), *model.buffers(), *arguments]}

    def keep(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = loss_of(model, *arguments)
    total = sum(storage.nbytes() for storage in storages.values() if storage is not None)
    del loss  # until here it held the storages, whose addresses are the keys
    return total


# -- Models at work


@dataclass
class Peer:
    """A model, and what its steps need."""

    model: nn.Module
    arguments: tuple[Tensor, Tensor, Tensor]
    bf16: bool
    optimizer: torch.optim.Optimizer | None  # None: a sampling step

    def step(self) -> None:
        if self.optimizer is None:
            with torch.inference_mode():
                self.model(*self.arguments, return_dict=False)
            return
        with torch.autocast(self.arguments[0].device.type, torch.bfloat16, enabled=self.bf16):
            loss = loss_of(self.model, *self.arguments)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def is_cuda(self) -> bool:
        return self.arguments[0].is_cuda

    def resident_bytes(self) -> int:
        """Of weights and optimiser."""
        state = [] if self.optimizer is None else self.optimizer.state.values()
        moments = sum(t.nbytes for values in state for t in values.values() if isinstance(t, Tensor))
        return bytes_of(self.model) + moments


@dataclass(frozen=True)
class Case:
    """What one group of rows is measured on."""

    shape: Shape
    side: int
    batch: int
    training: bool
    device: str
    bf16: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.bf16 and not self.training else torch.float32

    def make(self, name: str, scope: str = "none") -> Peer:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = add_noise(build(name, self.shape, self.side))
            nn.Module.to(model, self.dtype)  # diffusers' own would warn
            latents, *condition = inputs(self.shape, self.side, self.batch)
        if scope == "model":
            model.compile(dynamic=False)
        elif scope == "blocks":
            for block in getattr(model, "blocks", None) or model.transformer_blocks:
                block.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if self.training else None
        return Peer(model, (latents.to(self.dtype), *condition), self.bf16, optimizer)

    def needed_bytes(self, name: str) -> tuple[int, int]:
        """Of a training step: weights and moments that stay, gradients and activations that come and go."""
        weights = weight_bytes(name, self.shape, self.side)
        return 3 * weights, weights + saved_bytes(name, self.shape, self.side, self.batch, self.bf16)


class Roster:
    """The models of a case: all at once where memory allows, otherwise each for as long as it runs.

    On CUDA a step is tried, and may fail; running out of memory on a CPU would end more than this process.
    """

    def __init__(self, case: Case, names: list[str], scope: str):
        self.case, self.scope = case, scope
        self.peers: dict[str, Peer] = {}
        self.keep, self.left_out = True, set()
        owners = dict.fromkeys(VARIANTS.get(name, name) for name in names)
        if case.training and case.device == "cpu" and owners:
            room = available_bytes() / MARGIN
            needs = {name: case.needed_bytes(name) for name in owners}
            self.left_out = {name for name, need in needs.items() if sum(need) > room}
            held, running = zip(*needs.values(), strict=True)
            self.keep = sum(held) + max(running) <= room

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Peer]:
        """The model, made where it is not there yet; DoesNotFit says that it was left out."""
        owner = VARIANTS.get(name, name)
        if owner in self.left_out:
            raise DoesNotFit
        if owner not in self.peers:
            self.peers[owner] = self.case.make(owner, self.scope)
        yield self.peers[owner]
        if not self.keep:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Frees a model."""
        self.peers.pop(VARIANTS.get(name, name), None)
        free_memory()


def available_bytes() -> int:
    """Of main memory."""
    free_memory()
    return psutil.virtual_memory().available


def free_memory() -> None:
    """Gives back what this process holds without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
