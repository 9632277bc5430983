"""Weights of a network of images, for the same network of clips."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


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
