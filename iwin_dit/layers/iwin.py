"""The Iwin module: interleaved-window attention and a depthwise convolution (arXiv 2507.18405, section 3.2).

Legend: B batch, C channels, K heads, d = C / K, N tokens of a window, G windows of one image;
T frames, H, W sides of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from iwin_dit.layers import kernels, windows
from iwin_dit.layers.attention import Attention
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer


class TokenConv2d(nn.Conv2d):
    """``(B, H, W, C) -> (B, H, W, C)``.

    Tokens have their channels last, so the view that the convolution sees is in the channels-last memory
    format: no copy, and on a CPU three times faster than the contiguous one.
    """

    def forward(self, x: Tensor, *added: Tensor) -> Tensor:
        if added:
            return _in_triton(self, x, *added)
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class TokenConv3d(nn.Conv3d):
    """``(B, T, H, W, C) -> (B, T, H, W, C)``.

    Computed as the sum of 2-D convolutions of all frames, one for each frame of the kernel, moved in time: on
    a CPU the backward pass is three times as fast as that of PyTorch's 3-D convolution, and a single frame is
    an image, bit for bit.
    """

    def forward(self, x: Tensor, *added: Tensor) -> Tensor:
        if added:
            return _in_triton(self, x, *added)
        length, middle = x.shape[1], self.kernel_size[0] // 2
        frames = x.flatten(0, 1).movedim(-1, 1)  # (B T, C, H, W)
        parts = []
        for step in range(-middle, middle + 1):
            if abs(step) >= length:  # it meets zeros only
                continue
            bias = self.bias if step == 0 else None
            y = F.conv2d(
                frames, self.weight[:, :, middle + step], bias, padding=self.padding[1:], groups=self.groups
            )
            y = y.movedim(1, -1).view(x.shape)
            if step:
                y = y[:, max(step, 0) : length + min(step, 0)]
                y = F.pad(y, (0, 0, 0, 0, 0, 0, max(-step, 0), max(step, 0)))
            parts.append(y)
        return sum(parts[1:], parts[0])


def _in_triton(conv: Any, x: Tensor, *added: Tensor) -> Tensor:
    """Inside the call of the module that holds the weights, to which hooks bring them."""
    return kernels.depthwise_convolution(x, conv.weight, conv.bias, *added)


class DepthwiseConvolution(nn.Module):
    """Convolves each channel by itself over the grid, zero padding: ``(B, *grid, C) -> (B, *grid, C)``.

    Args:
        sides: of its window, two of images or three of clips.
    """

    def __init__(self, width: int, sides: tuple[int, ...]):
        super().__init__()
        self.sides = sides
        kind: Any = TokenConv2d if len(sides) == 2 else TokenConv3d
        self.conv = kind(width, width, sides, padding=[side // 2 for side in sides], groups=width)

    def forward(self, x: Tensor, *added: Tensor) -> Tensor:
        """In Triton, given what it adds (:func:`iwin_dit.layers.kernels.depthwise_convolution`)."""
        return self.conv(x, *added)


class InterleavedAttention(Attention):
    """Attention inside interleaved windows: ``(B, *grid, C) -> (B, *grid, C)``, on any grid.

    Zeros fill up a grid that the window does not divide; no query sees them if ``mask_padding`` is set.
    """

    def __init__(self, spec: BlockSpec):
        super().__init__(spec)
        self.mixer_spec = spec.mixer

    def forward(self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None) -> Tensor:
        """x ``(B, *grid, C)``, rope angles ``(*grid, d/2)``, qkv ``(B, *grid, 3 C)`` or None."""
        grid = tuple(x.shape[1:-1])
        window = self.mixer_spec.window(grid)
        padded = windows.padded_grid(grid, window)
        hides_padding = padded != grid and self.mixer_spec.mask_padding
        # the kernel in Triton knows neither positions nor norms of queries
        is_plain = rope is None and not self.has_qk_norm and (padded == grid or hides_padding)
        if is_plain and kernels.use_attention(x, x.shape[-1] // self.heads):
            qkv = self.qkv(x) if qkv is None else qkv
            return self.proj(kernels.interleaved_attention(qkv, window, self.heads))

        rows = windows.partition(windows.pad(x if qkv is None else qkv, padded), window)  # (B G, N, C or 3 C)
        mask = None
        if hides_padding:
            real = windows.partition(windows.real_tokens(grid, padded, x.device), window)  # (G, N, 1)
            mask = real.repeat(x.shape[0], 1, 1)[:, None, None, :, 0]  # (B G, 1, 1, N)
        if rope is not None:
            rope = windows.partition(windows.pad(rope[None], padded), window)  # (G, N, d/2)
            rope = rope.repeat(x.shape[0], 1, 1)[:, None]  # (B G, 1, N, d/2)
        rows = self.proj(self.attend(self.qkv(rows) if qkv is None else rows, rope, mask))
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

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        attended = self.attention(x, rope, qkv)
        return (attended,) if self.convolution is None else (attended, self.convolution(x))

    def add_branches(
        self,
        residual: Tensor,
        x: Tensor,
        gates: Sequence[Tensor],
        rope: Tensor | None = None,
        qkv: Tensor | None = None,
    ) -> Tensor:
        """As the block would, in one pass over the tokens where the convolution's kernel in Triton serves."""
        if self.convolution is None or not kernels.use_convolution(x, math.prod(self.convolution.sides)):
            return super().add_branches(residual, x, gates, rope, qkv)
        return self.convolution(x, residual, gates[1], self.attention(x, rope, qkv), gates[0])
