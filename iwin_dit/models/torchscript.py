"""The Iwin mixer in the part of Python that ``torch.jit.script`` compiles.

timm builds models from such parts under ``create_model(..., scriptable=True)``.

Legend: B batch, C channels, K heads, d = C / K, N tokens of a window, G windows of one image.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwin_dit.layers.specs import BlockSpec


class ScriptableAttention(nn.Module):
    """The parameters and the result of ``SelfAttention``: ``(B, N, C) -> (B, N, C)``."""

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:  # noqa: UP045
        """mask: ``(B, 1, 1, N)``, True for visible keys."""
        qkv = self.qkv(x).unflatten(-1, [3, self.heads, -1])
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, K, N, d) each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class ScriptableConvolution(nn.Module):
    """The parameters and the result of ``DepthwiseConvolution``: ``(B, H, W, C) -> (B, H, W, C)``."""

    def __init__(self, width: int, kernel: tuple[int, ...]):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=[side // 2 for side in kernel], groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


class ScriptableIwinMixer(nn.Module):
    """The parameters and the result of ``IwinMixer`` on images: ``(B, H, W, C) -> (B, H, W, C)``."""

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], clip_window: bool = True):
        super().__init__()
        window = spec.mixer.window_size
        if window == "auto":
            raise ValueError("window_size is 'auto': a scriptable model needs a number, or one per axis")
        self.window = list(window) if isinstance(window, list) else [window] * len(grid)
        self.clip_window = clip_window
        self.mask_padding = spec.mixer.mask_padding
        self.attention = ScriptableAttention(spec)
        self.convolution = (
            ScriptableConvolution(spec.width, spec.mixer.kernel(grid))
            if spec.mixer.has_convolution(grid)
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = self.window[0], self.window[1]
        if self.clip_window:
            rows, columns = min(rows, height), min(columns, width)
        row_groups, column_groups = (height + rows - 1) // rows, (width + columns - 1) // columns
        bottom, right = row_groups * rows - height, column_groups * columns - width

        mask: Optional[Tensor] = None  # noqa: UP045
        if self.mask_padding and bottom + right > 0:
            real = F.pad(torch.ones_like(x[..., :1], dtype=torch.bool), [0, 0, 0, right, 0, bottom])
            mask = self.partition(real, rows, columns).movedim(-1, 1).unsqueeze(1)  # (B G, 1, 1, N)
        tokens = self.partition(F.pad(x, [0, 0, 0, right, 0, bottom]), rows, columns)  # (B G, N, C)
        tokens = self.attention(tokens, mask)
        tokens = tokens.view(batch, row_groups, column_groups, rows, columns, channels)
        tokens = tokens.permute(0, 3, 1, 4, 2, 5).reshape(batch, height + bottom, width + right, channels)
        attended = tokens[:, :height, :width]
        return attended if self.convolution is None else attended + self.convolution(x)

    def partition(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Interleaved windows: ``(B, H, W, C) -> (B G, N, C)``."""
        batch, height, width, channels = x.shape
        x = x.view(batch, rows, height // rows, columns, width // columns, channels)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows * columns, channels)
