"""Between images and normalised latents, through any diffusers autoencoder.

Legend: B images, C latent channels, f the autoencoder's spatial factor.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor

from iwin_dit.runtime.errors import DataError

# Autoencoders of images that a folder or a hub repository may name.
VAES: dict[str, type] = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}


class Preset(NamedTuple):
    """A published autoencoder: where it is, latent channels, pixels per latent, and its scaling."""

    source: str
    channels: int
    factor: int
    scaling: float
    subfolder: str = ""


PRESETS = {
    "sd-vae-ft-ema": Preset("stabilityai/sd-vae-ft-ema", 4, 8, 0.18215),
    "sd-vae-ft-mse": Preset("stabilityai/sd-vae-ft-mse", 4, 8, 0.18215),
    "sdxl-vae": Preset("stabilityai/sdxl-vae", 4, 8, 0.13025),
    "sd3-vae": Preset("stabilityai/stable-diffusion-3-medium-diffusers", 16, 8, 1.5305, "vae"),
    "flux-vae": Preset("black-forest-labs/FLUX.1-dev", 16, 8, 0.3611, "vae"),
    "dc-ae-f32c32": Preset("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 32, 32, 0.3189),
}


def spatial_factor(vae: Any) -> int:
    """Pixels per latent along a side."""
    factor = getattr(vae, "spatial_compression_ratio", None)
    return factor or 2 ** (len(vae.config.block_out_channels) - 1)


def load_vae(name_or_path: str) -> Any:
    """A diffusers autoencoder by preset, folder or hub id, frozen and in evaluation mode; safetensors only.

    Raises:
        DataError: where it is not there, or is no autoencoder of images that is known here.
    """
    preset = PRESETS.get(name_or_path, Preset(name_or_path, 0, 0, 0.0))
    where = dict(subfolder=preset.subfolder) if preset.subfolder else {}
    if name_or_path not in PRESETS and "/" not in name_or_path and not Path(name_or_path).is_dir():
        near = difflib.get_close_matches(name_or_path, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
        raise DataError(f"the VAE {name_or_path} is no preset, folder or hub id such as user/model; {hint}")
    try:
        name = AutoencoderKL.load_config(preset.source, **where).get("_class_name")
        if name not in VAES:
            raise DataError(f"{name_or_path} holds a {name}, expected one of {', '.join(VAES)}")
        vae = VAES[name].from_pretrained(preset.source, use_safetensors=True, **where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        known = f"presets: {', '.join(PRESETS)}"
        raise DataError(f"the VAE {name_or_path} cannot be loaded: {reason} ({known})") from None
    return vae.eval().requires_grad_(False)


def weights_sha256(vae: Any) -> str:
    """A fingerprint of the autoencoder's weights, whatever its name or folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def vae_statistics(vae: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel, C numbers each, from the autoencoder's own config.

    diffusers writes them there as ``latents_mean`` and ``latents_std``, or as one ``shift_factor`` and one
    ``scaling_factor`` for all channels.
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
    """Posterior mean: images ``(B, 3, H, W)`` in [-1, 1] to raw float32 latents ``(B, C, H/f, W/f)``."""
    return encode_posterior(vae, images)[0]


@torch.no_grad()
def encode_posterior(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mean and standard deviation, as :func:`encode`; zeros for a VAE without one."""
    encoded = vae.encode(images.to(vae.dtype))
    if not hasattr(encoded, "latent_dist"):
        return encoded.latent.float(), torch.zeros_like(encoded.latent, dtype=torch.float32)
    return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents ``(B, C, H/f, W/f)`` to images ``(B, 3, H, W)``, about [-1, 1], in the VAE's dtype."""
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
