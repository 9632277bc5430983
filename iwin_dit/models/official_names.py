"""Weights of other networks for ours: the Iwin authors' names and layouts, and kernels of images for clips.

Their hierarchical models downsample at the end of a stage, ours (as timm's) at the start of the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from iwin_dit.models.backbone import IwinTransformer

WRAPPERS = ("model_ema", "state_dict_ema", "ema", "model", "state_dict")  # EMA first
PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+|_orig_mod\.")  # of DDP and torch.compile
BACKBONE = "backbone."

# Parts of our names and of theirs, replaced in this order.
NAMES = {
    ".mixer.attention.": ".attn.",
    ".mixer.convolution.conv.": ".dwconv.depthwise.",
    "head.fc.": "head.",
}
POSITIONS = {2: "absolute_pos_embed", 3: "time_embed"}  # by the rank of the grid


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors by their plain names.

    Training checkpoints hold ``model``, ``state_dict`` or an EMA, with names prefixed ``module.``; those of
    segmentors, detectors and recognisers have heads of their own beside ``backbone.``, which are left out.
    """
    wrapped = (state_dict[key] for key in WRAPPERS if isinstance(state_dict.get(key), Mapping))
    weights = {PREFIX.sub("", name): tensor for name, tensor in next(wrapped, state_dict).items()}
    inner = {name: tensor for name, tensor in weights.items() if name.startswith(BACKBONE)}
    return {name.removeprefix(BACKBONE): tensor for name, tensor in (inner or weights).items()}


def is_official(names: Iterable[str]) -> bool:
    """Whether these are the authors' names."""
    return any(".attn.qkv." in name for name in names)


def official_name(name: str, rank: int = 2) -> str:
    """The authors' name of a parameter of ours; the rank is that of the grid."""
    if name == "pos_embed":
        return POSITIONS[rank]
    name = re.sub(r"^layers\.(\d+)\.down", lambda match: f"layers.{int(match[1]) - 1}.down", name)
    name = re.sub(r"^feature_norms\.(\d+)", r"norm\1", name)
    for ours, official in NAMES.items():
        name = name.replace(ours, official)
    return name


def serves_later_stages(name: str, last: int) -> bool:
    """Whether a tensor, by its official name, has no part in the maps of the stages up to the last one."""
    match = re.match(r"layers\.(\d+)\.(\w+)", name)
    return match is not None and (
        int(match[1]) > last or (int(match[1]) == last and match[2] == "downsample")
    )


def to_our_names(weights: Mapping[str, Tensor], ours: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Official tensors under our names and in our layout; names that have no place keep theirs.

    Projections without a bias get zeros; convolutions of single frames get an axis of time.
    """
    expected = {official_name(name, rank): name for name in ours}
    renamed = {expected.get(name, name): tensor for name, tensor in weights.items()}
    for name, like in ours.items():
        if (
            name == "pos_embed" and name in renamed
        ):  # theirs are (1, N, D) or (1, D, *grid), ours (1, *grid, D)
            positions = renamed[name].movedim(1, -1) if renamed[name].ndim > 3 else renamed[name]
            fits = positions.numel() == like.numel()  # where not, the shapes still differ
            renamed[name] = positions.reshape(like.shape) if fits else positions
        elif name not in renamed and name.endswith(".qkv.bias"):
            renamed[name] = torch.zeros(like.shape)
        elif name in renamed and name.endswith(".convolution.conv.weight") and rank == 3:
            renamed[name] = renamed[name].unsqueeze(2)
    return renamed


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: IwinTransformer) -> dict[str, Tensor]:
    """Weights of an official checkpoint, or of one of ours, under the names of this ``IwinTransformer``.

    A model for large images has convolutions in a stage where one for smaller images has a single window.
    Such a stage gets zeros where its attention is given, which leaves what the weights compute as it is.
    """
    weights, ours = unwrap(state_dict), dict(model.state_dict())
    if is_official(weights):
        weights = to_our_names(weights, ours, model.rank)
    attending, convolving = (
        {name.split(".")[1] for name in weights if f".mixer.{part}." in name}
        for part in ("attention", "convolution")
    )
    return weights | {
        name: torch.zeros_like(like, device="cpu")
        for name, like in ours.items()
        if ".mixer.convolution." in name and name.split(".")[1] in attending - convolving
    }


def inflate(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives kernels their axis of time, so that the clip of one image over and over says what the image does.

    Depthwise kernels are zero but for the middle frame's, since what they read is padded with zeros: a single
    frame is an image, exactly. A patch of several frames takes the mean of the frames' (Carreira & Zisserman
    2017). The biases of relative positions are the same at every distance in time (Liu et al. 2022, Video
    Swin). What else is there in two dimensions is the same in three.

    Args:
        weights: of the network of images, by name.
        like: of the network of clips: the shapes that are wanted. A position embedding of frames that the
            other does not have is 0.
    """
    inflated = {name: _inflate(name, weight, like.get(name, weight)) for name, weight in weights.items()}
    if "pos_embed" in like and "pos_embed" not in weights:
        inflated["pos_embed"] = torch.zeros_like(like["pos_embed"])
    return inflated


def _inflate(name: str, weight: Tensor, like: Tensor) -> Tensor:
    if name.endswith("bias_table") and weight.ndim < like.ndim:
        return weight.expand(len(like), *weight.shape)
    if name.endswith("bias_network.0.weight") and weight.shape[1] < like.shape[1]:
        return torch.cat([torch.zeros_like(weight[:, :1]), weight], dim=1)
    if weight.ndim == like.ndim or weight.ndim != 4:
        return weight
    frames = like.shape[2]
    if ".convolution." not in name:
        return weight.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames
    kernel = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    kernel[:, :, frames // 2] = weight
    return kernel
