"""Shifted windows: Swin (Liu et al. 2021) and Swin V2 (Liu et al. 2022), on grids of any rank.

Legend: B batch, C channels, K heads, d = C / K, M tokens of a window along an axis, N tokens of a window,
G windows of one image, R rank of the grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from iwin_dit.layers import windows
from iwin_dit.layers.attention import CosineAttention, SelfAttention
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import TokenMixer


def of_pairs(table: Tensor, window: tuple[int, ...]) -> Tensor:
    """What a table holds for each pair of tokens, by their offset, from -(M - 1) to M - 1 an axis:
    ``(2 M - 1, .., K) -> (1, K, N, N)``.
    """
    index = torch.zeros(1, 1, dtype=torch.long, device=table.device)
    for m in window:
        place = torch.arange(m, device=table.device)
        offset = place[:, None] - place[None] + m - 1  # (M, M)
        index = index[:, None, :, None] * (2 * m - 1) + offset[None, :, None, :]
        index = index.flatten(2).flatten(0, 1)
    return table.flatten(0, -2)[index].movedim(-1, 0)[None]


class RelativeBias(nn.Module):
    """What is added to the scores for each relative position, learned (Swin).

    Args:
        window: its largest sides.
    """

    def __init__(self, window: tuple[int, ...], heads: int):
        super().__init__()
        self.window = window
        self.bias_table = nn.Parameter(torch.empty(*(2 * m - 1 for m in window), heads))
        nn.init.normal_(self.bias_table, std=0.02)

    def forward(self, window: tuple[int, ...], x: Tensor) -> Tensor:
        """For the scores of x: ``(1, K, N, N)``."""
        offsets = (slice(whole - m, whole + m - 1) for whole, m in zip(self.window, window, strict=True))
        return of_pairs(self.bias_table[tuple(offsets)], window)


class ContinuousBias(nn.Module):
    """The same made by a small network of the logarithm of the relative position (Swin V2)."""

    def __init__(self, window: tuple[int, ...], heads: int):
        super().__init__()
        self.window = window
        self.bias_network = nn.Sequential(
            nn.Linear(len(window), 512), nn.ReLU(), nn.Linear(512, heads, bias=False)
        )

    def forward(self, window: tuple[int, ...], x: Tensor) -> Tensor:
        """16 sigmoid of the network of ``sign(x) log2(1 + 8 |x|) / 3``, x an offset over that M - 1."""
        axes = [
            torch.arange(1 - m, m, device=x.device, dtype=torch.float32) / max(whole - 1, 1)
            for m, whole in zip(window, self.window, strict=True)
        ]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # (2 M - 1, .., R)
        logarithms = offsets.sign() * torch.log2(1 + 8 * offsets.abs()) / math.log2(8)
        return of_pairs(16 * torch.sigmoid(self.bias_network(logarithms.to(x.dtype))), window)


class SwinMixer(TokenMixer):
    """Attention in windows of neighbours, shifted by half a window in every second block, with a learned bias
    for each relative position.

    The windows are those of the grid that the model is made for, on every grid. On an axis that one window
    covers nothing is shifted.
    """

    attention_type: type[nn.Module] = SelfAttention
    bias_type: type[nn.Module] = RelativeBias

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.window = spec.mixer.window(grid)
        self.is_shifted = index % 2 == 1
        self.attention = self.attention_type(spec)
        self.relative_bias = self.bias_type(self.window, spec.heads)

    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        grid = tuple(x.shape[1:-1])
        window = tuple(min(m, side) for m, side in zip(self.window, grid, strict=True))
        padded = windows.padded_grid(grid, window)
        shift = [m // 2 if self.is_shifted and m < side else 0 for m, side in zip(window, grid, strict=True)]
        axes, there, back = list(range(1, 1 + len(grid))), [-s for s in shift], shift

        def rows(tokens: Tensor) -> Tensor:
            """(B, *grid, c) to (B G, N, c)."""
            tokens = windows.pad(tokens, padded)
            return windows.partition(torch.roll(tokens, there, axes), window, interleaved=False)

        mask = self.relative_bias(window, x)  # (1, K, N, N)
        if padded != grid or any(shift):
            hidden = ~self.visible(windows.real_tokens(grid, padded, x.device), window, shift)  # (G, 1, N, N)
            mask = mask.masked_fill(hidden, -torch.inf).repeat(x.shape[0], 1, 1, 1)
        if rope is not None:
            rope = rows(rope[None]).repeat(x.shape[0], 1, 1)[:, None]  # (B G, 1, N, d/2)
        if qkv is None:
            attended = self.attention(rows(x), rope, mask.to(x.dtype))
        else:
            attended = self.attention(x, rope, mask.to(x.dtype), rows(qkv))
        attended = windows.reverse(attended, window, padded, interleaved=False)
        return (windows.crop(torch.roll(attended, back, axes), grid),)

    @staticmethod
    def visible(real: Tensor, window: tuple[int, ...], shift: list[int]) -> Tensor:
        """Which keys a query sees in its window, ``(G, 1, N, N)``; real ``(1, *padded, 1)`` is no padding.

        Those that are real and that the roll has not brought from the other side of the image. A query that
        is padding itself sees padding too: its row is thrown away, but has to be finite.
        """
        sides = real.shape[1:-1]
        brought = [torch.arange(side, device=real.device) < s for side, s in zip(sides, shift, strict=True)]
        marks = torch.stack([real[0, ..., 0], *torch.meshgrid(*brought, indexing="ij")], -1)[None]
        rolled = torch.roll(marks, [-s for s in shift], list(range(1, 1 + len(sides))))
        real, *wrapped = windows.partition(rolled, window, interleaved=False).unbind(-1)  # (G, N) each
        seen = real[:, None, :] | ~real[:, :, None]
        for flags in wrapped:
            seen = seen & (flags[:, None, :] == flags[:, :, None])
        return seen[:, None]


class SwinV2Mixer(SwinMixer):
    """Cosine attention, and a bias that a small network makes of the logarithm of the relative position.

    The usual block normalises what a branch returns rather than what it reads: ``BlockSpec.post_norm``.
    """

    attention_type = CosineAttention
    bias_type = ContinuousBias
