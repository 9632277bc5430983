"""Token dropping in training, for windows: blocks in the middle see one token of each group of neighbours.

Of each 2 x 2 tokens (of clips 2 x 2 x 2) one is kept, at the same place of every group of an image. What is
left is a regular grid of half the side, on which windows and convolutions go on as they are. An axis with an
odd number of tokens is not thinned.

Source: SPRINT (Park et al. 2025, arXiv 2510.21986), for attention over all tokens. That the groups of an
image share the place is ours: it keeps the distances of tokens regular.

Legend: B batch, D width, P places of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def group_sides(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of a group along each axis of the grid: 2, or 1 where the number of tokens is odd."""
    return tuple(2 if side % 2 == 0 else 1 for side in grid)


def low_bits(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two more uniform numbers of each: ``(B,) -> (B,), (B,)``, so that images need no further ones.

    Numbers as torch draws them have 24 bits. The last 12 of u choose the kept token, and all of these but the
    first three whether the middle is left out; a time changes by less than 1/4096 with them.
    """
    choice = (u * 2**12).frac()
    return choice, (choice * 2**3).frac()


def thinned(
    model: Callable[..., T], u: Tensor, middle_dropout: float, is_sparse: bool = True
) -> Callable[..., T]:
    """The model as a training step calls it, where its middle blocks see fewer tokens.

    Args:
        model: of :class:`iwin_dit.models.transformer.IwinDiTTransformer2DModel`, perhaps wrapped.
        u: uniform numbers of the images, ``(B,)``, which choose; see :func:`low_bits`.
        middle_dropout: share of the images that skip the middle blocks.
        is_sparse: whether the middle sees one token of each group, or all.
    """
    choice, drop = low_bits(u)
    return partial(model, kept=choice if is_sparse else None, skip_middle=drop < middle_dropout)


class Kept:
    """Which tokens are kept: those at one place of each group.

    Args:
        choice: of each image, a number in [0, 1) that chooses the place, ``(B,)``.
        grid: of all tokens.
    """

    def __init__(self, choice: Tensor, grid: tuple[int, ...]):
        self.grid, self.groups = grid, group_sides(grid)
        self.half = tuple(side // group for side, group in zip(grid, self.groups, strict=True))
        places = math.prod(self.groups)
        place = (choice * places).long()  # (B,)
        chosen = place[:, None] == torch.arange(places, device=choice.device)  # (B, P)
        self.chosen = chosen.view(len(choice), *(n for side in self.groups for n in (1, side)), 1)

    def take(self, x: Tensor) -> Tensor:
        """The kept tokens: ``(B, *grid, D) -> (B, *half, D)``."""
        sides = (n for pair in zip(self.half, self.groups, strict=True) for n in pair)
        split = x.reshape(len(x), *sides, x.shape[-1])
        return torch.where(self.chosen, split, 0).sum(tuple(range(2, split.ndim, 2)))  # of one token

    def put_back(self, x: Tensor, mask: Tensor) -> Tensor:
        """Kept tokens where they stood, the mask ``(D,)`` elsewhere: ``(B, *half, D) -> (B, *grid, D)``."""
        split = x.view(len(x), *(n for side in self.half for n in (side, 1)), x.shape[-1])
        return torch.where(self.chosen, split, mask).view(len(x), *self.grid, x.shape[-1])


class Tokens(NamedTuple):
    """What goes through the blocks.

    x: residual stream ``(B, *grid, D)``; rope: angles ``(*grid, d/2)``; values: of the attention of the first
        block, ``(B, *grid, D)``, where later ones read them.
    """

    x: Tensor
    rope: Tensor | None = None
    values: Tensor | None = None

    def thinned(self, kept: Kept) -> Tokens:
        """The kept ones.

        The angles of the first place serve for all: they turn queries and keys alike, and scores depend on
        the distance of tokens alone.
        """
        every = tuple(slice(None, None, side) for side in kept.groups)
        values = None if self.values is None else kept.take(self.values)
        return Tokens(kept.take(self.x), None if self.rope is None else self.rope[every], values)


class SparseMiddle(nn.Module):
    """``W [f, g] + b`` of all tokens f after the first blocks, and of g, what the middle makes of them.

    A learned mask stands in g for tokens that the middle has not seen.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(width))
        self.fuse = nn.Linear(2 * width, width)

    def forward(
        self,
        tokens: Tokens,
        blocks: Callable[[Tokens], Tokens],
        choice: Tensor | None,
        skip: Tensor | bool,
        dtype: torch.dtype,
    ) -> Tokens:
        """All tokens after the middle.

        Args:
            tokens: after the first blocks.
            blocks: the middle.
            choice: the number that chooses the kept tokens, ``(B,)``; None keeps all.
            skip: images for which the mask stands everywhere, ``(B,)``; True, for all, runs no block.
            dtype: in which the two are joined.
        """
        f, mask = tokens.x, self.mask.to(tokens.x.dtype)
        if skip is True:
            g = mask.expand_as(f)
        elif choice is None:
            g = blocks(tokens).x
        else:
            kept = Kept(choice, tuple(f.shape[1:-1]))
            g = kept.put_back(blocks(tokens.thinned(kept)).x, mask)
        if isinstance(skip, Tensor):
            g = torch.where(skip.view(-1, *[1] * (f.ndim - 1)), mask, g)
        return tokens._replace(x=self.fuse(torch.cat([f, g], -1).to(dtype)).to(f.dtype))
