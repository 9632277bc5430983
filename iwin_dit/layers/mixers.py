"""The table of token mixers. A new one is a class with ``branches(x)`` in its own file, and a row here."""

from __future__ import annotations

from torch import Tensor

from iwin_dit.layers.attention import SelfAttention
from iwin_dit.layers.factorised import FactorisedMixer
from iwin_dit.layers.iwin import IwinMixer
from iwin_dit.layers.neighborhood import NeighborhoodMixer
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.swin import SwinMixer, SwinV2Mixer
from iwin_dit.layers.token_mixer import TokenMixer


class GlobalMixer(TokenMixer):
    """Attention over all tokens (DiT)."""

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.attention = SelfAttention(spec)

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        if rope is not None:
            rope = rope.flatten(0, -2)  # (N, d/2)
        return (self.attention(x.flatten(1, -2), rope).unflatten(1, x.shape[1:-1]),)


MIXERS: dict[str, type[TokenMixer]] = {
    "iwin": IwinMixer,
    "global": GlobalMixer,
    "swin": SwinMixer,
    "swin_v2": SwinV2Mixer,
    "neighborhood": NeighborhoodMixer,
    "factorised": FactorisedMixer,
}
