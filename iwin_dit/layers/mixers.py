"""Token mixers: ``mixer(x) -> x`` with x of shape ``(B, *grid, C)``.

Windowing, padding and masks live here; modulation and the residual live in the block. A mixer may have
several branches, which the block gates separately; called by itself it returns their sum.

Legend: B batch, C channels, K heads, d = C / K, N tokens that attend to each other, G windows of one image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from iwin_dit.layers import windows
from iwin_dit.layers.embeddings import apply_rope
from iwin_dit.layers.norm import QK_NORMS
from iwin_dit.layers.specs import BlockSpec


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of each row: ``(B, N, C) -> (B, N, C)``."""

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)
        head_width = spec.width // spec.heads
        self.q_norm = QK_NORMS[spec.norm](head_width) if spec.qk_norm else nn.Identity()
        self.k_norm = QK_NORMS[spec.norm](head_width) if spec.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """rope: angles ``(B, 1, N, d/2)`` or broadcastable. mask: ``(B, 1, 1, N)``, True for visible keys."""
        q, k, v = rearrange(
            self.qkv(x), "b n (three k d) -> three b k n d", three=3, k=self.heads
        )  # (B, K, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(x, "b k n d -> b n (k d)"))


class TokenMixer(nn.Module, ABC):
    """What a block needs of a mixer: how many branches it gates, and their outputs."""

    num_branches: int = 1

    @abstractmethod
    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        """x ``(B, *grid, C)``, rope angles ``(*grid, d/2)``: one ``(B, *grid, C)`` per branch."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return sum(self.branches(x, rope))


class GlobalMixer(TokenMixer):
    """Attention over all tokens (DiT)."""

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...]):
        super().__init__()
        self.attention = SelfAttention(spec)

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        grid = x.shape[1:-1]
        if rope is not None:
            rope = rope.flatten(0, -2)  # (N, d/2)
        return (self.attention(x.flatten(1, -2), rope).unflatten(1, grid),)


class IwinMixer(TokenMixer):
    """Interleaved-window attention beside a depthwise convolution (arXiv 2507.18405, section 3.2).

    Attention joins tokens that stand far apart, the convolution joins neighbours; no position embedding is
    needed. ``grid`` is the one that the model is made for and decides whether there is a convolution; any
    grid is valid input.
    """

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...]):
        super().__init__()
        self.spec = spec.mixer
        self.attention = SelfAttention(spec)
        convolution = {2: DepthwiseConvolution, 3: DepthwiseConvolution3D}[len(grid)]
        self.convolution = (
            convolution(spec.width, spec.mixer.kernel(grid)) if spec.mixer.has_convolution(grid) else None
        )
        self.num_branches = 1 if self.convolution is None else 2

    def branches(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        attended = self.window_attention(x, rope)
        return (attended,) if self.convolution is None else (attended, self.convolution(x))

    def window_attention(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        grid = tuple(x.shape[1:-1])
        window = self.spec.window(grid)
        padded = windows.padded_grid(grid, window)
        mask = None
        if padded != grid:
            if self.spec.mask_padding:
                mask = self._key_mask(grid, padded, window, x)  # (B G, 1, 1, N)
            x = windows.pad(x, padded)
        if rope is not None:
            rope = windows.partition(windows.pad(rope[None], padded), window)  # (G, N, d/2)
            rope = rope.repeat(x.shape[0], 1, 1)[:, None]  # (B G, 1, N, d/2)
        x = windows.partition(x, window)  # (B G, N, C)
        x = self.attention(x, rope, mask)
        x = windows.reverse(x, window, padded)
        return windows.crop(x, grid) if padded != grid else x

    @staticmethod
    def _key_mask(
        grid: tuple[int, ...], padded: tuple[int, ...], window: tuple[int, ...], x: Tensor
    ) -> Tensor:
        real = windows.pad(torch.ones(1, *grid, 1, dtype=torch.bool, device=x.device), padded)
        return windows.partition(real, window).repeat(x.shape[0], 1, 1)[:, None, :, 0].unsqueeze(2)


class DepthwiseConvolution(nn.Module):
    """Convolves each channel by itself over the grid, zero padding: ``(B, H, W, C) -> (B, H, W, C)``.

    Tokens have their channels last, so the view that the convolution sees is in the channels-last memory
    format: no copy, and on a CPU three times faster than the contiguous one.

    Args:
        kernel: its sides.
    """

    def __init__(self, width: int, kernel: tuple[int, ...]):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=[side // 2 for side in kernel], groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


class DepthwiseConvolution3D(nn.Module):
    """The same over time, too: ``(B, T, H, W, C) -> (B, T, H, W, C)``.

    Computed as the sum of 2-D convolutions of all frames, one for each frame of the kernel, moved in time: on
    a CPU the backward pass is three times as fast as that of PyTorch's 3-D convolution, and a single frame is
    an image, bit for bit.
    """

    def __init__(self, width: int, kernel: tuple[int, ...]):
        super().__init__()
        self.conv = nn.Conv3d(width, width, kernel, padding=[side // 2 for side in kernel], groups=width)

    def forward(self, x: Tensor) -> Tensor:
        weight, length = self.conv.weight, x.shape[1]
        frames = x.flatten(0, 1).movedim(-1, 1)  # (B T, C, H, W)
        total = None
        for step in range(-(weight.shape[2] // 2), weight.shape[2] // 2 + 1):
            if abs(step) >= length:  # it meets zeros only
                continue
            slice_ = weight[:, :, weight.shape[2] // 2 + step]
            bias = self.conv.bias if step == 0 else None
            y = F.conv2d(frames, slice_, bias, padding=self.conv.padding[1:], groups=weight.shape[0])
            y = y.movedim(1, -1).view(x.shape)
            if step:
                y = y[:, max(step, 0) : length + min(step, 0)]
                y = F.pad(y, (0, 0, 0, 0, 0, 0, max(-step, 0), max(step, 0)))
            total = y if total is None else total + y
        return total


MIXERS: dict[str, type[TokenMixer]] = {"iwin": IwinMixer, "global": GlobalMixer}
