"""The Iwin module: interleaved-window attention and a depthwise convolution (arXiv 2507.18405, section 3.2).

Legend: B batch, C channels, K heads, d = C / K, N tokens of a window, G windows of one image.
"""

from __future__ import annotations

from torch import Tensor

from iwin_dit.layers import windows
from iwin_dit.layers.attention import SelfAttention
from iwin_dit.layers.convolution import DEPTHWISE
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
        convolution = DEPTHWISE[len(grid)]
        self.convolution = (
            convolution(spec.width, spec.mixer.kernel(grid)) if spec.mixer.has_convolution(grid) else None
        )
        self.num_branches = 1 if self.convolution is None or self.spec.convolution_on == "values" else 2

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        attended = self.window_attention(x, rope)
        if self.num_branches == 1:
            return (attended,)
        return attended, self.convolution(x if self.spec.convolution_on == "input" else attended)

    def window_attention(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        grid = tuple(x.shape[1:-1])
        window = self.spec.window(grid)
        padded = windows.padded_grid(grid, window)
        mask = None
        if padded != grid and self.spec.mask_padding:
            real = windows.partition(windows.real_tokens(grid, padded, x.device), window)  # (G, N, 1)
            mask = real.repeat(x.shape[0], 1, 1)[:, None, None, :, 0]  # (B G, 1, 1, N)
        if rope is not None:
            rope = windows.partition(windows.pad(rope[None], padded), window)  # (G, N, d/2)
            rope = rope.repeat(x.shape[0], 1, 1)[:, None]  # (B G, 1, N, d/2)

        if self.convolution is not None and self.spec.convolution_on == "values":
            qkv = self.attention.qkv(x)  # (B, *grid, 3 C)
            local = self.convolution(qkv[..., -x.shape[-1] :])
            rows = windows.partition(windows.pad(qkv, padded), window)
            attended = windows.reverse(self.attention.attend(rows, rope, mask), window, padded)
            return self.attention.proj(windows.crop(attended, grid) + local)

        rows = windows.partition(windows.pad(x, padded), window)  # (B G, N, C)
        return windows.crop(windows.reverse(self.attention(rows, rope, mask), window, padded), grid)
