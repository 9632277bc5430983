"""The official Iwin Transformers under their names in timm.

Source: arXiv 2507.18405, table of variants. ``_22k`` are pre-trained on the 21,841 classes of ImageNet-22K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from iwin_dit.models.backbone import IwinFeatures, IwinTransformer, checkpoint_filter_fn

# width of the first stage, depths, heads; and heads of the ImageNet-22K release
BACKBONE_SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 4, 8, 16), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48), (6, 12, 24, 48)),
}
WINDOWS = {224: 7, 384: 12, 512: 16, 1024: 16}  # by image size
CLASSES_22K = 21841


def _variants() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of the constructor and timm's configuration, by name."""
    variants = {}
    for size, (width, depths, heads, heads_22k) in BACKBONE_SIZES.items():
        for side, window in WINDOWS.items():
            for suffix in ("", "_22k"):
                arguments = dict(
                    img_size=side,
                    window_size=window,
                    embed_dim=width,
                    depths=depths,
                    num_heads=heads_22k if suffix else heads,
                )
                cfg = dict(
                    url="",
                    num_classes=CLASSES_22K if suffix else 1000,
                    input_size=(3, side, side),
                    pool_size=(side // 32, side // 32),
                    crop_pct=0.9 if side == 224 else 1.0,
                    interpolation="bicubic",
                    fixed_input_size=False,
                    mean=IMAGENET_DEFAULT_MEAN,
                    std=IMAGENET_DEFAULT_STD,
                    first_conv="patch_embed.proj",
                    classifier="head.fc",
                    paper_name="Iwin Transformer",
                    paper_ids="arXiv:2507.18405",
                )
                variants[f"iwin_{size}_patch4_window{window}_{side}{suffix}"] = (arguments, cfg)
    return variants


VARIANTS = _variants()
# Arguments of IwinTransformer3D by name: T and S. timm's registry is of images.
VIDEO_MODELS: dict[str, dict[str, Any]] = {
    f"iwin_{size}_video": dict(embed_dim=width, depths=depths, num_heads=heads, global_pool="avg")
    for size, (width, depths, _, heads) in BACKBONE_SIZES.items()
    if size in ("tiny", "small")
}
default_cfgs = generate_default_cfgs({name: cfg for name, (_, cfg) in VARIANTS.items()})
__all__ = [
    "BACKBONE_SIZES",
    "CLASSES_22K",
    "VARIANTS",
    "VIDEO_MODELS",
    "WINDOWS",
    "create_iwin_transformer",
    "default_cfgs",
]


def create_iwin_transformer(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A registered model; ``features_only=True`` gives the maps ``(B, D, H, W)`` of ``out_indices``."""
    depths = kwargs.get("depths", VARIANTS[name][0]["depths"])
    features: dict[str, Any] = dict(out_indices=kwargs.pop("out_indices", tuple(range(len(depths)))))
    if "feature_cls" in kwargs:
        features |= dict(flatten_sequential=True)
    else:
        features |= dict(feature_cls=IwinFeatures, output_fmt="NCHW")
    return build_model_with_cfg(
        IwinTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=features,
        **{**VARIANTS[name][0], **kwargs},
    )


def _register(name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_iwin_transformer(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    return register_model(entrypoint)


globals().update({name: _register(name) for name in VARIANTS})
