"""Attention over all tokens, the mixer of DiT."""

from __future__ import annotations

from torch import Tensor

from iwin_dit.layers.attention import SelfAttention
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer


class GlobalMixer(TokenMixer):
    """Each token attends to every token: ``(B, *grid, C) -> (B, *grid, C)``."""

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.attention = SelfAttention(spec)

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        if rope is not None:
            rope = rope.flatten(0, -2)  # (N, d/2)
        return (self.attention(x.flatten(1, -2), rope).unflatten(1, x.shape[1:-1]),)
