"""The Iwin Transformers of clips, by name. They are not timm's, whose registry is of models of images."""

from __future__ import annotations

from typing import Any

from iwin_dit.models.iwin_transformer import BACKBONE_SIZES


def _arguments(size: str) -> dict[str, Any]:
    width, depths, _, heads = BACKBONE_SIZES[size]
    return dict(
        patch_size=(2, 4, 4),
        window_size=7,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        global_pool="avg",
    )


# Arguments of IwinTransformer3D: T and S (arXiv 2507.18405) with patches of two frames.
VIDEO_MODELS: dict[str, dict[str, Any]] = {
    f"iwin_{size}_video": _arguments(size) for size in ("tiny", "small")
}
