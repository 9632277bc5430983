"""The Iwin module: interleaved-window attention and a depthwise convolution (arXiv 2507.18405, section 3.2).

Legend: B batch, C channels, K heads, d = C / K, N tokens of a window, G windows of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from iwin_dit.layers import kernels, windows
from iwin_dit.layers.attention import SelfAttention
from iwin_dit.layers.convolution import DepthwiseConvolution
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer


class IwinMixer(TokenMixer):
    """Attention joins tokens that stand far apart, the convolution joins neighbours: no position embedding.

    ``grid`` is the one that the model is made for and decides whether there is a convolution; any grid is
    valid input. What the convolution reads is ``spec.mixer.convolution_on``: the mixer's input, beside
    attention; the values, whose convolution is added to what attention makes of them; or attention's output.
    """

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.spec = spec.mixer
        self.attention = SelfAttention(spec)
        kernel = spec.mixer.kernel(grid)
        self.taps = math.prod(kernel)
        self.convolution = (
            DepthwiseConvolution(spec.width, kernel) if spec.mixer.has_convolution(grid) else None
        )
        self.num_branches = 1 if self.convolution is None or self.spec.convolution_on == "values" else 2

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        attended = self.window_attention(x, rope)
        if self.num_branches == 1:
            return (attended,)
        return attended, self.convolution(self._convolved(x, attended))

    def add_branches(
        self, residual: Tensor, x: Tensor, gates: Sequence[Tensor], rope: Tensor | None = None
    ) -> Tensor:
        """As the block would, in one pass over the tokens where the convolution's kernel serves them."""
        if self.num_branches == 1 or not kernels.use_convolution(x, self.taps):
            return super().add_branches(residual, x, gates, rope)
        attended = self.window_attention(x, rope)
        return self.convolution(self._convolved(x, attended), residual, gates[1], attended, gates[0])

    def _convolved(self, x: Tensor, attended: Tensor) -> Tensor:
        """What the convolution reads."""
        return x if self.spec.convolution_on == "input" else attended

    def window_attention(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Attention's branch: ``(B, *grid, C) -> (B, *grid, C)``."""
        grid = tuple(x.shape[1:-1])
        window = self.spec.window(grid)
        attention = self.attention
        on_values = self.convolution is not None and self.spec.convolution_on == "values"
        by_kernel = self._kernel_serves(x, rope, grid, window)
        if not on_values and not by_kernel:
            return self._in_windows(attention, x, rope, grid, window)
        qkv = attention.qkv(x)  # (B, *grid, 3 C)
        if by_kernel:
            attended = kernels.interleaved_attention(qkv, window, attention.heads)
        else:
            attended = self._in_windows(attention.attend, qkv, rope, grid, window)
        if on_values:
            attended = attended + self.convolution(qkv[..., 2 * x.shape[-1] :])
        return attention.proj(attended)

    def _kernel_serves(
        self, x: Tensor, rope: Tensor | None, grid: tuple[int, ...], window: tuple[int, ...]
    ) -> bool:
        """Whether the kernel of attention may take this: plain heads, and no padding that takes part."""
        head_width = x.shape[-1] // self.attention.heads
        plain = rope is None and not self.attention.has_qk_norm
        hidden = self.spec.mask_padding or windows.padded_grid(grid, window) == grid
        return plain and hidden and kernels.use_attention(x, head_width)

    def _in_windows(
        self,
        attend: Callable[..., Tensor],
        x: Tensor,
        rope: Tensor | None,
        grid: tuple[int, ...],
        window: tuple[int, ...],
    ) -> Tensor:
        """``attend(rows, rope, mask)`` on windows as rows: ``(B G, N, C)`` of ``(B, *grid, C)`` and back."""
        padded = windows.padded_grid(grid, window)
        mask = None
        if padded != grid and self.spec.mask_padding:
            real = windows.partition(windows.real_tokens(grid, padded, x.device), window)  # (G, N, 1)
            mask = real.repeat(x.shape[0], 1, 1)[:, None, None, :, 0]  # (B G, 1, 1, N)
        if rope is not None:
            rope = windows.partition(windows.pad(rope[None], padded), window)  # (G, N, d/2)
            rope = rope.repeat(x.shape[0], 1, 1)[:, None]  # (B G, 1, N, d/2)
        rows = windows.partition(windows.pad(x, padded), window)
        return windows.crop(windows.reverse(attend(rows, rope, mask), window, padded), grid)
