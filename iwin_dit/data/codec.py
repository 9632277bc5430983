"""Between images or clips and normalised latents, through any diffusers autoencoder.

An autoencoder of images takes a clip frame by frame; one of videos compresses time too, and takes an image as
a clip of one frame.

Legend: B images or clips, C latent channels, T frames, f and g the autoencoder's factors in space and time.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)
from torch import Tensor

from iwin_dit.data.identity import IDENTITY, IdentityAutoencoder
from iwin_dit.runtime.errors import ConfigError, DataError, reason

# Autoencoders that a folder or a hub repository may name; diffusers' classes have no types.
IMAGE_VAES = (AutoencoderKL, AutoencoderDC)
VIDEO_VAES = (AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo, AutoencoderKLWan)
VAES: dict[str, Any] = {kind.__name__: kind for kind in (*IMAGE_VAES, IdentityAutoencoder, *VIDEO_VAES)}
FRAMES_AT_ONCE = 64  # through an autoencoder of images


class Preset(NamedTuple):
    """Where a published autoencoder is on the hub."""

    source: str
    subfolder: str = ""


PRESETS = {
    "sd-vae-ft-ema": Preset("stabilityai/sd-vae-ft-ema"),
    "sd-vae-ft-mse": Preset("stabilityai/sd-vae-ft-mse"),
    "sdxl-vae": Preset("stabilityai/sdxl-vae"),
    "sd3-vae": Preset("stabilityai/stable-diffusion-3-medium-diffusers", "vae"),
    "flux-vae": Preset("black-forest-labs/FLUX.1-dev", "vae"),
    "dc-ae-f32c32": Preset("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"),
}
# VA-VAE f16d32 (Yao et al. 2025), the autoencoder of LightningDiT and of the Iwin authors' generator. It is
# published as an original file, not for diffusers, so that build/data.py loads it.
VA_VAE_PRESET = "va-vae-f16d32"


def spatial_factor(vae: Any) -> int:
    """Pixels per latent along a side."""
    factor = getattr(vae, "spatial_compression_ratio", None)
    return factor or 2 ** (len(vae.config.block_out_channels) - 1)


def is_of_videos(vae: Any) -> bool:
    """Whether it compresses time, and takes clips as they are."""
    return VAES.get(type(vae).__name__) in VIDEO_VAES


def temporal_factor(vae: Any) -> int:
    """Frames per latent frame, g; the first frame has a latent frame of its own."""
    if not is_of_videos(vae):
        return 1
    config = vae.config
    found = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio")
    return int(found or vae.temporal_compression_ratio)


def latent_frames(vae: Any, frames: int) -> int:
    """Latent frames of a clip of so many frames, ``(T - 1) / g + 1``.

    Raises:
        ConfigError: where the autoencoder has no such clips, with the nearest numbers.
    """
    step = temporal_factor(vae)
    if isinstance(vae, AutoencoderKLCogVideoX):
        step *= 2  # it decodes an even number of latent frames to other frames than it encoded
    before = (frames - 1) // step * step + 1
    if frames < 1 or before != frames:
        raise ConfigError(
            f"{type(vae).__name__} has no clips of {frames} frames; nearest: {before} and {before + step}"
        )
    return (frames - 1) // temporal_factor(vae) + 1


def pixel_frames(vae: Any, frames: int) -> int:
    """Frames of a clip of so many latent frames: the inverse of :func:`latent_frames`."""
    return (frames - 1) * temporal_factor(vae) + 1


def latent_channels(vae: Any) -> int:
    """C."""
    return vae.config.get("latent_channels") or vae.config["z_dim"]


def load_vae(name_or_path: str) -> Any:
    """An autoencoder by preset, folder or hub id, frozen and in evaluation mode; safetensors only.

    The name ``none`` is that of :class:`IdentityAutoencoder`.

    Raises:
        DataError: where it is not there, or is no autoencoder that is known here.
    """
    if name_or_path == IDENTITY:
        return IdentityAutoencoder().eval()
    preset = PRESETS.get(name_or_path, Preset(name_or_path))
    where = dict(subfolder=preset.subfolder) if preset.subfolder else {}
    names = [*PRESETS, VA_VAE_PRESET, IDENTITY]
    known = f"presets: {', '.join(names)}"
    if name_or_path not in PRESETS and "/" not in name_or_path and not Path(name_or_path).is_dir():
        near = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"did you mean {near[0]}?" if near else known
        raise DataError(f"the VAE {name_or_path} is no preset, folder or hub id such as user/model; {hint}")
    try:
        name = AutoencoderKL.load_config(preset.source, **where).get("_class_name")
        if name not in VAES:
            raise DataError(f"{name_or_path} holds a {name}, expected one of {', '.join(VAES)}")
        vae = VAES[name].from_pretrained(preset.source, use_safetensors=True, **where)
    except (OSError, ValueError) as error:
        is_preset = name_or_path in PRESETS
        told = f" (the preset of {preset.source})" if is_preset else ""
        hint = "" if is_preset else f"; {known}"
        raise DataError(f"the VAE {name_or_path}{told} cannot be loaded: {reason(error)}{hint}") from None
    return vae.eval().requires_grad_(False)


def usable_dtype(vae: Any, dtype: torch.dtype) -> torch.dtype:
    """What the autoencoder may compute in: float32 instead of float16 if its config says ``force_upcast``.

    The activations of such autoencoders (SDXL's, to begin with) are beyond the largest number of float16.
    """
    return torch.float32 if dtype == torch.float16 and vae.config.get("force_upcast") else dtype


def weights_sha256(vae: Any) -> str:
    """A fingerprint of the autoencoder's weights, whatever its name or folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def vae_statistics(vae: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel, C numbers each, from the autoencoder itself.

    diffusers has them in the config as ``latents_mean`` and ``latents_std``, or as one ``shift_factor`` and
    one ``scaling_factor`` for all channels, or, of LTX, among the weights.
    """
    config, channels = vae.config, latent_channels(vae)
    if isinstance(vae, AutoencoderKLLTXVideo):
        return vae.latents_mean.tolist(), (vae.latents_std / config["scaling_factor"]).tolist()
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return list(config["latents_mean"]), list(config["latents_std"])
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    return [shift] * channels, [1 / scale] * channels


def normalize(latents: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """``(latents - mean) / std`` per channel: ``(B, C, ...)``."""
    return (latents - _per_channel(mean, latents)) / _per_channel(std, latents)


def denormalize(latents: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The inverse of :func:`normalize`."""
    return latents * _per_channel(std, latents) + _per_channel(mean, latents)


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, *[1] * (like.ndim - 2))


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Posterior mean, raw and in float32.

    Args:
        pixels: in [-1, 1], images ``(B, 3, H, W)`` or clips ``(B, 3, T, H, W)``.

    Returns:
        latents ``(B, C, H/f, W/f)``, or ``(B, C, (T - 1)/g + 1, H/f, W/f)``; an autoencoder of videos always
        gives the latter.
    """
    return encode_posterior(vae, pixels)[0]


@torch.no_grad()
def encode_posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mean and standard deviation, as :func:`encode`; zeros for a VAE without one."""

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        encoded = vae.encode(pixels)
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent.float(), torch.zeros_like(encoded.latent, dtype=torch.float32)
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()

    mean, std = _apply(vae, call, pixels[:, :, None] if pixels.ndim == 4 and is_of_videos(vae) else pixels)
    return mean, std


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents to images ``(B, 3, H, W)`` or clips ``(B, 3, T, H, W)``, about [-1, 1], in its dtype."""
    return _apply(vae, lambda latents: vae.decode(latents, return_dict=False)[:1], latents)[0]


def _apply(vae: Any, call: Callable[[Tensor], tuple[Tensor, ...]], values: Tensor) -> list[Tensor]:
    """An autoencoder's call in a dtype that it may compute in; one of images takes clips frame by frame."""
    if (dtype := usable_dtype(vae, vae.dtype)) != vae.dtype:
        vae.to(dtype=dtype)  # and stays there
    values = values.to(vae.dtype)
    if values.ndim == 4 or is_of_videos(vae):
        return list(call(values))
    parts = [call(frames) for frames in values.transpose(1, 2).flatten(0, 1).split(FRAMES_AT_ONCE)]
    return [
        torch.cat(part).unflatten(0, (len(values), -1)).transpose(1, 2) for part in zip(*parts, strict=True)
    ]
