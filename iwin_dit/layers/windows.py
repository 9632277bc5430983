"""Windows of tokens on a grid of any rank: Iwin's interleaved ones and Swin's plain ones, one pattern each.

Token ``h = m G + g`` of a side with G = side / M groups belongs to group g and is its m-th token: an
interleaved window collects tokens that stand G apart and so spans the whole image; a plain window
(``h = g M + m``) collects neighbours.

Legend: B batch, C channels, M tokens of a window along an axis, G groups along an axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def _patterns(rank: int, interleaved: bool) -> tuple[str, str]:
    """For rank 2: ``b (m0 g0) (m1 g1) c`` and ``(b g0 g1) (m0 m1) c``."""
    m, g = [f"m{i}" for i in range(rank)], [f"g{i}" for i in range(rank)]
    axes = [f"({a} {b})" for a, b in (zip(m, g, strict=True) if interleaved else zip(g, m, strict=True))]
    return f"b {' '.join(axes)} c", f"(b {' '.join(g)}) ({' '.join(m)}) c"


def partition(x: Tensor, window: tuple[int, ...], interleaved: bool = True) -> Tensor:
    """Grid to windows: ``(B, *grid, C) -> (B prod(G), prod(M), C)``; the window divides the grid."""
    grid_side, window_side = _patterns(len(window), interleaved)
    return rearrange(x, f"{grid_side} -> {window_side}", **{f"m{i}": m for i, m in enumerate(window)})


def reverse(
    windows: Tensor, window: tuple[int, ...], grid: tuple[int, ...], interleaved: bool = True
) -> Tensor:
    """The inverse of :func:`partition`: ``(B prod(G), prod(M), C) -> (B, *grid, C)``."""
    grid_side, window_side = _patterns(len(window), interleaved)
    sizes = {f"m{i}": m for i, m in enumerate(window)}
    sizes |= {f"g{i}": side // m for i, (side, m) in enumerate(zip(grid, window, strict=True))}
    return rearrange(windows, f"{window_side} -> {grid_side}", **sizes)


def padded_grid(grid: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest grid that holds ``grid`` and that the window divides."""
    return tuple(-(-side // m) * m for side, m in zip(grid, window, strict=True))


def pad(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Zeros at the end of each axis (bottom and right) up to ``grid``: ``(B, *, C) -> (B, *grid, C)``."""
    if tuple(x.shape[1:-1]) == grid:
        return x
    missing = [want - have for want, have in zip(grid, x.shape[1:-1], strict=True)]
    return F.pad(x, (0, 0, *(n for axis in reversed(missing) for n in (0, axis))))


def crop(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The first ``grid`` tokens of each axis: the inverse of :func:`pad`."""
    if tuple(x.shape[1:-1]) == grid:
        return x
    return x[(slice(None), *(slice(side) for side in grid))]


def real_tokens(grid: tuple[int, ...], padded: tuple[int, ...], device: torch.device) -> Tensor:
    """True where a token of the padded grid is no padding: ``(1, *padded, 1)``."""
    return pad(torch.ones(1, *grid, 1, dtype=torch.bool, device=device), padded)
