"""Normalisation over the channels, with statistics in float32.

The norms of a block are adaptive: ``norm(x) (1 + scale) + shift`` with scale and shift from the condition. A
learned weight is folded into the scale, which is one vector an image, so that the tokens are multiplied once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwin_dit.layers.specs import NormName

EPS = 1e-6


class AdaptiveLayerNorm(nn.Module):
    """Layer norm without a weight of its own, then scale and shift (DiT)."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
        """x ``(B, *grid, D)``, shift (or None), scale ``(B, 1, .., 1, D)``; the result has scale's dtype."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
        return modulate(normed, shift, 1 + scale.float()).to(scale.dtype)


class AdaptiveRMSNorm(nn.Module):
    """Root mean square norm with a learned weight (Zhang & Sennrich 2019), then scale and shift."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
        """As :meth:`AdaptiveLayerNorm.forward`."""
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=EPS)
        return modulate(normed, shift, self.weight * (1 + scale.float())).to(scale.dtype)


def modulate(x: Tensor, shift: Tensor | None, factor: Tensor) -> Tensor:
    """``x factor + shift`` in float32."""
    return x * factor if shift is None else torch.addcmul(shift.float(), x, factor)


class QKLayerNorm(nn.LayerNorm):
    """Layer norm of queries or keys, per head, with a learned weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class QKRMSNorm(nn.RMSNorm):
    """RMS norm of queries or keys, per head, with a learned weight."""

    def __init__(self, width: int):
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), self.normalized_shape, eps=self.eps) * self.weight).to(x.dtype)


NORMS: dict[NormName, type[nn.Module]] = {"rms_norm": AdaptiveRMSNorm, "layer_norm": AdaptiveLayerNorm}
QK_NORMS: dict[NormName, Callable[[int], nn.Module]] = {"rms_norm": QKRMSNorm, "layer_norm": QKLayerNorm}
