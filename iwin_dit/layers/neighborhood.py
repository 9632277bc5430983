"""Neighbourhood attention (Hassani et al. 2023): each token attends to the M x M tokens around it.

Legend: B batch, C channels, K heads, d = C / K, N tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from iwin_dit.layers.attention import SelfAttention
from iwin_dit.layers.embeddings import apply_rope
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer

try:
    import natten
except ImportError:  # the optional extra
    natten = None


class NeighborhoodMixer(TokenMixer):
    """At the borders the neighbourhood moves inwards, so that every token has as many keys.

    By the kernels of ``natten`` on a GPU, where it is installed (``pip install 'iwin-dit[natten]'``).
    Without, attention over all tokens with a mask gives the same result, at the cost of global attention.
    """

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.spec = spec.mixer
        self.spec.window(grid)  # raises where it does not fit
        self.attention = SelfAttention(spec)

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        grid = tuple(x.shape[1:-1])
        window = self.spec.window(grid)
        if natten is not None and x.is_cuda and min(window) > 1:  # its windows have at least two tokens
            qkv = self.project(x) if qkv is None else qkv
            return (self._by_natten(qkv, window, rope),)
        rope = None if rope is None else rope.flatten(0, -2)  # (N, d/2)
        mask = neighborhood_mask(grid, window, x.device)
        qkv = None if qkv is None else qkv.flatten(1, -2)
        return (self.attention(x.flatten(1, -2), rope, mask, qkv).unflatten(1, grid),)

    def _by_natten(self, qkv: Tensor, window: tuple[int, ...], rope: Tensor | None) -> Tensor:
        attention, function = self.attention, {2: natten.na2d, 3: natten.na3d}[len(window)]
        q, k, v = rearrange(qkv, "b ... (three k d) -> three b ... k d", three=3, k=attention.heads)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rope is not None:
            q, k = apply_rope(rope.unsqueeze(-2), q, k)
        return attention.proj(function(q, k, v, kernel_size=window).flatten(-2))


def neighborhood_mask(grid: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> Tensor:
    """Whether token i sees token j: ``(N, N)``."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for side, m in zip(grid, window, strict=True):
        place = torch.arange(side, device=device)
        first = (place - m // 2).clamp(0, side - m)[:, None]
        axis = (first <= place) & (place < first + m)  # (side, side)
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask
