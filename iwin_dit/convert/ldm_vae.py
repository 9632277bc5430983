"""LDM's autoencoder (CompVis; hustvl's VA-VAE has the same network) as diffusers' :class:`AutoencoderKL`.

VA-VAE f16d32 is ``ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, resolution=256, attn_resolutions=[16],
z_channels=32``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from iwin_dit.convert.arguments import check_values
from iwin_dit.convert.names import check_fit, find_tensors
from iwin_dit.runtime.errors import listed

# LDM's ddconfig with embed_dim: arguments that must be given, and the others' defaults.
REQUIRED = ("ch", "ch_mult", "num_res_blocks", "resolution", "attn_resolutions", "z_channels")
DEFAULTS = dict(double_z=True, in_channels=3, out_ch=3, dropout=0.0, embed_dim=None)
EXAMPLES = DEFAULTS | dict(
    ch=128, ch_mult=[1], num_res_blocks=2, resolution=256, attn_resolutions=[], z_channels=4, embed_dim=4
)

WRAPPERS = ("ema", "state_dict", "model")
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|first_stage_model)\.)+|_orig_mod\.")
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")

# diffusers' names and the official ones, replaced in this order.
NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "down_blocks": "down",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
PROJECTION = re.compile(r"\.attn(?:_1|\.\d+)\.(?:q|k|v|proj_out)\.weight$")  # (C, C, 1, 1) there, (C, C) here


def from_ldm_vae(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> AutoencoderKL:
    """CompVis/latent-diffusion's AutoencoderKL, or VA-VAE's; latents are not scaled (scaling_factor 1).

    The config is LDM's ``ddconfig`` with ``embed_dim``, flat or as ``{"ddconfig": {...}, "embed_dim": n}``.
    A training checkpoint is unwrapped, EMA first; its losses and VA-VAE's foundation model are left out.

    Raises:
        ValueError: listing missing or unexpected names or arguments, or tensors of another shape.
    """
    official = _arguments(config)
    return _load(_build(official), _unwrap(state_dict))


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    given, unknown = dict(config), set()
    if "ddconfig" in given:
        if not isinstance(given["ddconfig"], Mapping):
            raise ValueError(f"ddconfig is {type(given['ddconfig']).__name__}, expected arguments by name")
        outer = {name: value for name, value in given.items() if name != "ddconfig"}
        unknown = set(outer) - {"embed_dim"}
        given = dict(given["ddconfig"]) | outer
    unknown |= set(given) - {*REQUIRED, *DEFAULTS}
    if unknown:
        raise ValueError(
            f"unknown arguments {listed(sorted(map(str, unknown)))}; "
            f"the official autoencoder has {', '.join((*REQUIRED, *DEFAULTS))}"
        )
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    check_values(given, EXAMPLES, optional=("embed_dim",))
    official = DEFAULTS | given
    if not official["double_z"]:
        raise ValueError("double_z must be true: the encoder gives mean and log-variance")
    if official["embed_dim"] not in (None, official["z_channels"]):
        raise ValueError(
            f"embed_dim {official['embed_dim']} is not z_channels {official['z_channels']}: "
            "AutoencoderKL has one number for both"
        )
    return official


def _build(official: dict[str, Any]) -> AutoencoderKL:
    """AutoencoderKL's attention has a single head as wide as its level, as in LDM; dropout it has none."""
    levels = range(len(official["ch_mult"]))
    attention = [official["resolution"] // 2**level in official["attn_resolutions"] for level in levels]
    return AutoencoderKL(
        in_channels=official["in_channels"],
        out_channels=official["out_ch"],
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attention[::-1]),
        block_out_channels=tuple(official["ch"] * multiple for multiple in official["ch_mult"]),
        layers_per_block=official["num_res_blocks"],
        latent_channels=official["z_channels"],
        norm_num_groups=32,
        sample_size=official["resolution"],
        scaling_factor=1.0,
    )


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The autoencoder's tensors by their plain names."""
    tensors = find_tensors(state_dict, WRAPPERS)
    plain = {PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in plain.items() if not name.startswith(TRAINING_ONLY)}


def _load(model: AutoencoderKL, weights: dict[str, Tensor]) -> AutoencoderKL:
    """Copies the official weights in by name. Every name must be used, and none may be missing."""
    levels = len(model.config.block_out_channels)
    ours = model.state_dict()
    official = {name: _official_name(name, levels) for name in ours}
    ends = {name: (1, 1) if PROJECTION.search(official[name]) else () for name in ours}
    check_fit({official[name]: (*ours[name].shape, *ends[name]) for name in ours}, weights)
    model.load_state_dict({name: weights[official[name]].reshape(ours[name].shape) for name in ours})
    return model.eval()


def _official_name(name: str, levels: int) -> str:
    """The decoder's levels count from the image there, from the latents here."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, official in NAMES.items():
        name = name.replace(ours, official)
    return name
