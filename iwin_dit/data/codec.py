"""Between images and normalised latents, through any diffusers autoencoder.

Legend: B images, C latent channels, f the autoencoder's spatial factor.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def spatial_factor(vae: Any) -> int:
    """Pixels per latent along a side."""
    factor = getattr(vae, "spatial_compression_ratio", None)
    return factor or 2 ** (len(vae.config.block_out_channels) - 1)


def load_vae(name_or_path: str) -> AutoencoderKL:
    """A diffusers autoencoder from a folder or the hub, frozen and in evaluation mode."""
    return AutoencoderKL.from_pretrained(name_or_path).eval().requires_grad_(False)


def vae_statistics(vae: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel that the autoencoder's own config declares, C numbers
    each.

    diffusers writes them as ``latents_mean`` and ``latents_std``, or as one ``shift_factor`` and
    ``scaling_factor``.
    """
    config, channels = vae.config, vae.config.latent_channels
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return list(config["latents_mean"]), list(config["latents_std"])
    return [config.get("shift_factor") or 0.0] * channels, [
        1 / (config.get("scaling_factor") or 1.0)
    ] * channels


def normalize(latents: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """``(latents - mean) / std`` per channel: ``(B, C, ...)``."""
    return (latents - _per_channel(mean, latents)) / _per_channel(std, latents)


def denormalize(latents: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The inverse of :func:`normalize`."""
    return latents * _per_channel(std, latents) + _per_channel(mean, latents)


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, *[1] * (like.ndim - 2))


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """The posterior's mean: images ``(B, 3, H, W)`` in [-1, 1] to raw latents ``(B, C, H/f, W/f)``,
    float32.
    """
    return vae.encode(images.to(vae.dtype)).latent_dist.mode().float()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents ``(B, C, H/f, W/f)`` to images ``(B, 3, H, W)``, about [-1, 1], in the autoencoder's
    dtype.
    """
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
