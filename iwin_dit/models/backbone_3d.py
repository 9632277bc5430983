"""The Iwin Transformer for clips: windows span all frames and interleave in space (arXiv 2507.18405).

Legend: B batch, C channels of the clip, T frames of the grid, D width of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from iwin_dit.layers.specs import BlockSpec, per_axis
from iwin_dit.models.backbone import IwinTransformer


class IwinTransformer3D(IwinTransformer):
    """The Iwin Transformer on clips ``(B, C, T, H, W)``, of any size.

    It gives features ``(B, D, T, H, W)`` after the last norm, or logits where it has pooling and a
    classifier. A learned embedding tells the frames apart.

    Args:
        img_size: (frames, height, width) of the clips that the model is made for.
        patch_size: frames, rows and columns of a token.
        num_classes: classes; 0 leaves the classifier out, and needs no pooling.
        global_pool: pooling over space and time, such as ``avg``.
        pos_embed: whether there is an embedding per frame.
        options: further arguments of :class:`~iwin_dit.models.backbone.IwinTransformer`; its windows span all
            frames.
    """

    rank = 3

    def __init__(
        self,
        img_size: Sequence[int] = (32, 224, 224),
        patch_size: Sequence[int] = (2, 4, 4),
        num_classes: int = 0,
        global_pool: str = "",
        pos_embed: bool = True,
        **options: Any,
    ):
        options |= dict(num_classes=num_classes, global_pool=global_pool, pos_embed=pos_embed)
        super().__init__(img_size, patch_size, **options)

    def make_mixer(self, spec: BlockSpec, grid: tuple[int, ...], clip_window: bool) -> nn.Module:
        """Windows over all frames, and a convolution per frame."""
        window, kernel = ["all", *per_axis(spec.mixer.window_size, 2)], [1, 3, 3]
        spec = replace(spec, mixer=replace(spec.mixer, window_size=window, kernel_size=kernel))
        return super().make_mixer(spec, grid, clip_window)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, T, H, W, D)`` to logits, or to features ``(B, D, T, H, W)`` where there is no pooling."""
        if not self.global_pool:
            return x.movedim(-1, 1)
        return super().forward_head(x.flatten(1, 2), pre_logits)
