"""LDM's autoencoder (CompVis; hustvl's VA-VAE has the same network) as diffusers' :class:`AutoencoderKL`.

VA-VAE f16d32 is ``ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, resolution=256, attn_resolutions=[16],
z_channels=32``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL

from iwin_dit.convert.arguments import check_known, check_values
from iwin_dit.convert.official_files import find_tensors, load, renamed

# LDM's ddconfig with embed_dim: arguments that must be given, and the others' defaults.
REQUIRED = ("ch", "ch_mult", "num_res_blocks", "resolution", "attn_resolutions", "z_channels")
DEFAULTS = dict(double_z=True, in_channels=3, out_ch=3, dropout=0.0, embed_dim=None)
EXAMPLES = DEFAULTS | dict(
    ch=128, ch_mult=[1], num_res_blocks=2, resolution=256, attn_resolutions=[], z_channels=4, embed_dim=4
)

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
    # AutoencoderKL's attention has a single head as wide as its level, as in LDM; dropout it has none
    levels = range(len(official["ch_mult"]))
    attention = [official["resolution"] // 2**level in official["attn_resolutions"] for level in levels]
    model = AutoencoderKL(
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

    def official_name(name: str) -> str:
        # the decoder's levels count from the image there, from the latents here
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels[-1] - int(match[1])}", name)
        return renamed(name, NAMES)

    tensors = find_tensors(state_dict)
    plain = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    weights = {name: tensor for name, tensor in plain.items() if not name.startswith(TRAINING_ONLY)}
    shapes = {official_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    projections = {name: (*shape, 1, 1) for name, shape in shapes.items() if PROJECTION.search(name)}
    return load(model, weights, official_name, projections)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    outer = dict(config)
    given = outer.pop("ddconfig", None)
    if given is None:
        given, outer = outer, {}
    elif not isinstance(given, Mapping):
        raise ValueError(f"ddconfig is {type(given).__name__}, expected arguments by name")
    check_known(outer, ("embed_dim",), "config beside ddconfig has")
    check_known(given, (*REQUIRED, *DEFAULTS), "autoencoder has")
    given = dict(given) | outer
    if missing := [name for name in REQUIRED if name not in given]:
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
