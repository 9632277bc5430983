"""DiT, LightningDiT and FlashDiT (the Iwin authors' generator) as :class:`IwinDiTTransformer2DModel`.

LightningDiT and FlashDiT put noise at t = 0 and data at t = 1 and predict data minus noise. The imported
model answers in our convention, ``ours(x, 1000 (1 - t), y) = - theirs(x, t, y)``: a linear map of the
timestep in its config and a sign folded into its last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iwin_dit.convert.arguments import check_known, check_values
from iwin_dit.convert.official_files import find_tensors, load, renamed
from iwin_dit.layers.embeddings import rope_angles, sincos_positions
from iwin_dit.models.transformer import IwinDiTTransformer2DModel

# The official constructors' arguments and their defaults.
DIT = dict(
    input_size=32,
    patch_size=2,
    in_channels=4,
    hidden_size=1152,
    depth=28,
    num_heads=16,
    mlp_ratio=4.0,
    class_dropout_prob=0.1,
    num_classes=1000,
    learn_sigma=True,
)
LIGHTNINGDIT = DIT | dict(
    in_channels=32,
    learn_sigma=False,
    use_qknorm=False,
    use_swiglu=False,
    use_rope=False,
    use_rmsnorm=False,
    wo_shift=False,
    use_checkpoint=False,
)
FLASHDIT = LIGHTNINGDIT | dict(window_size=(8, 8))

NOISE_FIRST = dict(timestep_scale=-1e-3, timestep_shift=1.0, prediction_type="flow_prediction")

# Parts of our names and of the official ones, replaced in this order; MLPs differ.
NAMES = {
    "patch_embed.proj": "x_embedder.proj",
    "timestep_embedding.linear_1": "t_embedder.mlp.0",
    "timestep_embedding.linear_2": "t_embedder.mlp.2",
    "label_embedding": "y_embedder.embedding_table",
    "norm_out": "final_layer.norm_final",
    "modulation_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "norm_1": "norm1",
    "norm_2": "norm2",
    "mixer.attention": "attn",
    "mixer.convolution.conv": "dwconv.depthwise",
    "modulation.linear": "adaLN_modulation.1",
}
MLP_NAMES = {
    "swiglu": {"mlp.gate_up": "mlp.w12", "mlp.down": "mlp.w3"},
    "gelu": {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
}


def from_dit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> IwinDiTTransformer2DModel:
    """facebookresearch/DiT: global attention, sin-cos positions, learned sigma.

    Timesteps are integers or floats in 0..999.

    Raises:
        ValueError: listing missing or unexpected names, arguments that are unknown or of another kind, or
            tensors of another shape.
    """
    official = _arguments(config, DIT)
    return _import(
        state_dict,
        official,
        out_channels=official["in_channels"] * (2 if official["learn_sigma"] else 1),
        mixer={"name": "global"},
        position_embedding="sincos",
        open_gates=False,
        prediction_type="epsilon",
    )


def from_lightningdit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> IwinDiTTransformer2DModel:
    """hustvl/LightningDiT, in our time convention. Raises ValueError as :func:`from_dit` does."""
    official = _arguments(config, LIGHTNINGDIT)
    positions = "sincos+rope" if official["use_rope"] else "sincos"
    mixer = {"name": "global"}
    return _import(
        state_dict, official, mixer=mixer, position_embedding=positions, open_gates=False, **NOISE_FIRST
    )


def from_flashdit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> IwinDiTTransformer2DModel:
    """Cominder/Iwin-Transformer, image generation ("FlashDiT"), in our time convention.

    Raises ValueError as :func:`from_dit` does.
    """
    official = _arguments(config, FLASHDIT)
    mixer = {"name": "iwin", "window_size": official["window_size"], "convolution": True}
    return _import(
        state_dict, official, mixer=mixer, position_embedding="none", open_gates=True, **NOISE_FIRST
    )


def _arguments(config: Mapping[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    check_known(config, defaults)
    check_values(config, defaults)
    official = defaults | dict(config)
    width, heads = official["hidden_size"], official["num_heads"]
    if width % heads:
        raise ValueError(f"num_heads is {heads}, expected a divisor of hidden_size {width}")
    return official


def _import(
    state_dict: Mapping[str, Any], official: dict[str, Any], **options: Any
) -> IwinDiTTransformer2DModel:
    model = IwinDiTTransformer2DModel(
        sample_size=official["input_size"],
        patch_size=official["patch_size"],
        in_channels=official["in_channels"],
        num_layers=official["depth"],
        num_attention_heads=official["num_heads"],
        attention_head_dim=official["hidden_size"] // official["num_heads"],
        num_classes=official["num_classes"],
        class_dropout_prob=official["class_dropout_prob"],
        mlp_ratio=official["mlp_ratio"],
        norm="rms_norm" if official.get("use_rmsnorm") else "layer_norm",
        mlp="swiglu" if official.get("use_swiglu") else "gelu",
        qk_norm=official.get("use_qknorm", False),
        modulation_shift=not official.get("wo_shift", False),
        **options,
    )
    weights = find_tensors(state_dict)
    if model.config.position_embedding != "none":
        _drop_positions(weights, model)
    if model.config.prediction_type == "flow_prediction":
        _fold_output(weights, model, official["learn_sigma"])
    patches = weights.get(f"{NAMES['patch_embed.proj']}.weight")
    if patches is not None and patches.ndim == 4:  # theirs is a convolution, (D, C, p, p)
        weights[f"{NAMES['patch_embed.proj']}.weight"] = patches.flatten(1)
    return load(model, weights, partial(renamed, names=NAMES | MLP_NAMES[model.config.mlp]))


def _drop_positions(weights: dict[str, Tensor], model: IwinDiTTransformer2DModel) -> None:
    """Position tables are computed, not stored: checks the official ones against ours and takes them out."""
    grid, config = model.grid(*model.latent_size), model.config
    width = config.num_attention_heads * config.attention_head_dim
    tables = {"pos_embed": sincos_positions(grid, width, torch.device("cpu")).flatten(0, 1)[None]}
    if model.use_rope:
        angles = rope_angles((grid[0], grid[1]), config.attention_head_dim, torch.device("cpu"))
        angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)
        tables |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    missing = [name for name in tables if name not in weights]
    if missing:
        raise ValueError(f"the state dict lacks {', '.join(missing)}")
    for name, table in tables.items():
        found = weights.pop(name).float()
        if found.shape != table.shape or not torch.allclose(found, table, atol=1e-2):
            raise ValueError(
                f"{name} {tuple(found.shape)} is not the fixed table of a {grid[0]} x {grid[1]} grid: "
                "check input_size, patch_size, hidden_size and num_heads"
            )


def _fold_output(weights: dict[str, Tensor], model: IwinDiTTransformer2DModel, learn_sigma: bool) -> None:
    """Drops the sigma that these models throw away, and turns data minus noise into noise minus data."""
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in weights:
            rows = weights[name]
            if learn_sigma:  # rows are laid out (p, q, channel)
                count = 2 * model.out_channels * model.patch_size**2
                if rows.shape[:1] != (count,):
                    raise ValueError(
                        f"{name} is {tuple(rows.shape)}, expected {count} rows: "
                        "check learn_sigma, in_channels and patch_size"
                    )
                rows = rows.unflatten(0, (-1, 2 * model.out_channels))[:, : model.out_channels].flatten(0, 1)
            weights[name] = -rows
