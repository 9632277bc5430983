"""Normalisation over the channels. The input is the float32 residual stream; the statistics stay in
float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm with a learned weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight


class LayerNorm(nn.Module):
    """Layer norm without a learned weight: the modulation that follows has one (DiT)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)


class QKLayerNorm(nn.LayerNorm):
    """Layer norm of queries or keys, per head, with a learned weight and bias; the result has the input's
    dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class QKRMSNorm(RMSNorm):
    """RMS norm of queries or keys, per head; the result has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}
QK_NORMS: dict[str, type[nn.Module]] = {"rms_norm": QKRMSNorm, "layer_norm": QKLayerNorm}
