"""The Iwin module: interleaved-window attention and a depthwise convolution (arXiv 2507.18405, section 3.2).

Legend: B batch, C channels, K heads, d = C / K, N tokens of a window, G windows of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from iwin_dit.layers import kernels, windows
from iwin_dit.layers.attention import Attention
from iwin_dit.layers.convolution import DepthwiseConvolution
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer


class InterleavedAttention(Attention):
    """Attention inside interleaved windows: ``(B, *grid, C) -> (B, *grid, C)``, on any grid.

    Zeros fill up a grid that the window does not divide; no query sees them if ``mask_padding`` is set.
    """

    def __init__(self, spec: BlockSpec):
        super().__init__(spec)
        self.mixer_spec = spec.mixer

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """x ``(B, *grid, C)``, rope angles ``(*grid, d/2)``."""
        grid = tuple(x.shape[1:-1])
        window = self.mixer_spec.window(grid)
        padded = windows.padded_grid(grid, window)
        hides_padding = padded != grid and self.mixer_spec.mask_padding
        # the kernel in Triton knows neither positions nor norms of queries
        is_plain = rope is None and not self.has_qk_norm and (padded == grid or hides_padding)
        if is_plain and kernels.use_attention(x, x.shape[-1] // self.heads):
            return self.proj(kernels.interleaved_attention(self.qkv(x), window, self.heads))

        rows = windows.partition(windows.pad(x, padded), window)  # (B G, N, C)
        mask = None
        if hides_padding:
            real = windows.partition(windows.real_tokens(grid, padded, x.device), window)  # (G, N, 1)
            mask = real.repeat(x.shape[0], 1, 1)[:, None, None, :, 0]  # (B G, 1, 1, N)
        if rope is not None:
            rope = windows.partition(windows.pad(rope[None], padded), window)  # (G, N, d/2)
            rope = rope.repeat(x.shape[0], 1, 1)[:, None]  # (B G, 1, N, d/2)
        rows = self.proj(self.attend(self.qkv(rows), rope, mask))
        return windows.crop(windows.reverse(rows, window, padded), grid)


class IwinMixer(TokenMixer):
    """Attention joins tokens that stand far apart, the convolution joins neighbours: no position embedding.

    Both read the same tokens. ``grid`` is the one that the model is made for and decides whether there is a
    convolution; any grid is valid input.
    """

    attention_type: type[InterleavedAttention] = InterleavedAttention

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.spec = spec.mixer
        self.attention = self.attention_type(spec)
        self.convolution: DepthwiseConvolution | None = None
        if spec.mixer.has_convolution(grid):
            self.convolution = DepthwiseConvolution(spec.width, spec.mixer.kernel_sides(grid))
            self.num_branches = 2

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        attended = self.attention(x, rope)
        return (attended,) if self.convolution is None else (attended, self.convolution(x))

    def add_branches(
        self, residual: Tensor, x: Tensor, gates: Sequence[Tensor], rope: Tensor | None = None
    ) -> Tensor:
        """As the block would, in one pass over the tokens where the convolution's kernel in Triton serves."""
        if self.convolution is None or not kernels.use_convolution(x, math.prod(self.convolution.sides)):
            return super().add_branches(residual, x, gates, rope)
        return self.convolution(x, residual, gates[1], self.attention(x, rope), gates[0])
