"""The Iwin authors' hierarchical models: classification, dense features, and video.

The names in a state dict tell which of the three it is, and shapes tell most arguments. Heads, window and
image size have to come from the config; the S models of the two releases differ in their heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor

from iwin_dit.convert.arguments import check_known, check_values
from iwin_dit.convert.official_files import find_tensors, load
from iwin_dit.models.backbone import IwinFeatures, IwinTransformer, IwinTransformer3D
from iwin_dit.models.official_names import official_name, serves_later_stages, to_our_names, unwrap

# Arguments of the official constructors that weights do not tell, with defaults, and those that matter in
# training only or choose an implementation.
CHOSEN = dict(
    num_heads=None,
    window_size=7,
    img_size=224,
    pretrain_img_size=224,
    mlp_ratio=4.0,
    qk_scale=None,
    drop_path_rate=0.0,
)
EXAMPLES = CHOSEN | dict(
    num_heads=[3], window_size=(7,), img_size=(224, 224), pretrain_img_size=(224, 224), qk_scale=1.0
)
WITHOUT_EFFECT = (
    *("drop_rate", "attn_drop_rate", "norm_layer", "use_checkpoint", "fused_window_process", "frozen_stages"),
    *("pretrained", "pretrained2d", "init_cfg", "with_cp", "convert_weights", "act_cfg", "norm_cfg"),
)
PATCHES, FIRST_MLP = "patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight"


def from_iwin_transformer(
    state_dict: Mapping[str, Any], config: Mapping[str, Any]
) -> IwinTransformer | IwinFeatures | IwinTransformer3D:
    """Cominder/Iwin-Transformer, as the names in the state dict tell.

    Classification: images ``(B, C, H, W)`` to logits. Dense backbones of segmentation and detection, which
    have a norm per stage: images to a list of normalised maps ``(B, D, H, W)``, one for each of
    ``out_indices``. Video, which has a ``time_embed``: clips ``(B, C, T, H, W)`` to features
    ``(B, D, T, H, W)``.

    Training checkpoints are unwrapped, EMA first. Heads beside a ``backbone.`` are left out.

    Raises:
        ValueError: listing missing or unexpected names, arguments that are unknown, lacking or not those of
            the weights, or tensors of another shape.
    """
    weights = unwrap(find_tensors(state_dict))
    told, convolution, mlp_ratio = _read(weights)
    chosen = _arguments(config, told)
    if mlp_ratio is not None and "mlp_ratio" not in config:
        chosen["mlp_ratio"] = mlp_ratio
    arguments = {name: told[name] for name in ("patch_size", "in_chans", "embed_dim", "depths", "patch_norm")}
    arguments |= dict(
        num_heads=list(chosen["num_heads"]),
        window_size=chosen["window_size"],
        mlp_ratio=chosen["mlp_ratio"],
        convolution=convolution,
        mask_padding=False,
        drop_path_rate=chosen["drop_path_rate"],
    )
    model: IwinTransformer | IwinFeatures | IwinTransformer3D
    inner: IwinTransformer | IwinTransformer3D
    if "time_embed" in weights:
        frames = weights["time_embed"].shape[2] * told["patch_size"][0]
        model = inner = IwinTransformer3D(img_size=(frames, *to_2tuple(chosen["img_size"])), **arguments)
    elif told["out_indices"]:
        size = chosen["pretrain_img_size"] if "pretrain_img_size" in config else chosen["img_size"]
        arguments |= dict(img_size=size, pos_embed=told["ape"], clip_window=False, feature_norm=True)
        inner = IwinTransformer(num_classes=0, global_pool="", **arguments)
        model = IwinFeatures(inner, told["out_indices"])
        last = told["out_indices"][-1]
        weights = {name: weights[name] for name in weights if not serves_later_stages(name, last)}
        arguments |= dict(features_only=True, out_indices=told["out_indices"])
    else:
        arguments |= dict(img_size=chosen["img_size"], pos_embed=told["ape"], num_classes=told["num_classes"])
        model = inner = IwinTransformer(**arguments)
    if chosen["qk_scale"] is not None:
        _fold_scale(weights, chosen["num_heads"], chosen["qk_scale"])
    rename = partial(official_name, rank=inner.rank)
    official = {name: rename(name) for name in inner.state_dict()}
    found = to_our_names(weights, inner.state_dict(), inner.rank)
    load(inner, {official.get(name, name): tensor for name, tensor in found.items()}, rename)
    model._model_args = arguments  # where timm keeps what a model is built from
    return model.eval()


def _read(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[bool], float | None]:
    """The official arguments that names and shapes tell; the stages that convolve; the ratio of MLPs."""
    if PATCHES not in weights:
        raise ValueError(
            f"the state dict has no {PATCHES}, so it is not an Iwin Transformer's; "
            f"it has {', '.join(sorted(weights)[:5]) or 'no tensors'}"
        )
    for name in (PATCHES, FIRST_MLP, "head.weight"):
        if name in weights and weights[name].ndim < 2:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, expected two axes or more")
    patches = weights[PATCHES]
    found = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in weights]
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    stages = range(1 + max((stage for stage, _ in blocks), default=-1))
    norms = [re.fullmatch(r"norm(\d+)\.weight", name) for name in weights]
    hidden = weights.get(FIRST_MLP)
    told = dict(
        patch_size=list(patches.shape[2:]),
        in_chans=patches.shape[1],
        num_classes=weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        embed_dim=patches.shape[0],
        depths=[sum(stage == s for s, _ in blocks) for stage in stages],
        ape="absolute_pos_embed" in weights,
        patch_norm="patch_embed.norm.weight" in weights,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in weights,
        out_indices=sorted(int(match[1]) for match in norms if match),
    )
    convolution = [f"layers.{stage}.blocks.0.dwconv.depthwise.weight" in weights for stage in stages]
    return told, convolution, None if hidden is None else hidden.shape[0] / hidden.shape[1]


def _arguments(config: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments, with defaults; what config and weights both tell has to agree."""
    check_known(config, (*told, *CHOSEN, *WITHOUT_EFFECT), "constructors have")
    if config.get("num_heads") is None:
        raise ValueError("the config lacks num_heads, which the weights do not tell")
    check_values(config, EXAMPLES, optional=("qk_scale",))
    if len(config["num_heads"]) != len(told["depths"]):
        raise ValueError(f"num_heads is {config['num_heads']}, the weights have {len(told['depths'])} stages")
    wrong = []
    for name, found in told.items():
        given = config.get(name)
        if given is None or (name == "num_classes" and told["out_indices"]):
            continue
        given = list(given) if isinstance(given, list | tuple) else given
        if name == "patch_size" and isinstance(given, int):
            given = [given] * len(found)
        if given != found and not (name == "out_indices" and not found):
            wrong.append(f"{name} is {config[name]}, the weights have {found}")
    if wrong:
        raise ValueError(f"the state dict does not fit the config: {'; '.join(wrong)}")
    return CHOSEN | {name: value for name, value in config.items() if name in CHOSEN}


def _fold_scale(weights: dict[str, Tensor], heads: list[int], scale: float) -> None:
    """Attention of another scale than ``d^-1/2``: the queries carry the difference."""
    for name in [name for name in weights if ".attn.qkv." in name]:
        rows = weights[name].clone()
        width = rows.shape[0] // 3
        rows[:width] *= scale * (width / heads[int(name.split(".")[1])]) ** 0.5
        weights[name] = rows
