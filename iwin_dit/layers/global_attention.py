"""Attention over all tokens, the mixer of DiT; and, of clips, over space, then over time.

Source: Bertasius et al. 2021, "divided"; Ma et al. 2024.

Legend: B batch, T frames, H, W sides of the grid, C channels.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from iwin_dit.layers.attention import SelfAttention
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer


class GlobalMixer(TokenMixer):
    """Each token attends to every token: ``(B, *grid, C) -> (B, *grid, C)``."""

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.attention = SelfAttention(spec)

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if rope is not None:
            rope = rope.flatten(0, -2)  # (N, d/2)
        qkv = None if qkv is None else qkv.flatten(1, -2)
        return (self.attention(x.flatten(1, -2), rope, qkv=qkv).unflatten(1, x.shape[1:-1]),)


class SpatialMixer(GlobalMixer):
    """Attention over the tokens of each frame: ``(B, T, H, W, C) -> (B, T, H, W, C)``."""

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (super().branches(x.flatten(0, 1))[0].view(x.shape),)


class TemporalMixer(GlobalMixer):
    """Attention over the frames of each place."""

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        places = rearrange(x, "b t h w c -> (b h w) t c")
        b, _, h, w, _ = x.shape
        return (rearrange(self.attention(places), "(b h w) t c -> b t h w c", b=b, h=h, w=w),)


class FactorisedMixer(TokenMixer):
    """The one after the other, each with projections of its own."""

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.spatial, self.temporal = SpatialMixer(spec, grid), TemporalMixer(spec, grid)

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return self.temporal.branches(self.spatial(x))
