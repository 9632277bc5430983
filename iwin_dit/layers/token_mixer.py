"""What a block asks of a token mixer."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iwin_dit.layers.specs import BlockSpec


class TokenMixer(nn.Module, ABC):
    """``mixer(x) -> x`` with x of shape ``(B, *grid, C)``: how the tokens of a block exchange information.

    Windowing, padding and masks live inside; modulation and gates are the block's. A mixer may have several
    branches, each with a gate of its own; called by itself it returns their sum. Its parameters are those of
    modules that it calls, so that hooks on these (offloading, layer-wise casting) find them. A class takes
    the arguments of :func:`make_mixer`.
    """

    num_branches: int = 1
    attention: Any  # of mixers whose row has takes_projections

    @abstractmethod
    def branches(
        self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One ``(B, *grid, C)`` per branch.

        Args:
            x: tokens ``(B, *grid, C)``.
            rope: angles ``(*grid, d/2)``.
            qkv: what :meth:`project` makes of x, perhaps changed, ``(B, *grid, 3 C)``. Default: the same,
                unchanged. A mixer whose row has no ``takes_projections`` is never given it.
        """

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of tokens ``(B, *grid, C)``: ``(B, *grid, 3 C)``."""
        return self.attention.qkv(x)

    def add_branches(
        self,
        residual: Tensor,
        x: Tensor,
        gates: Sequence[Tensor],
        rope: Tensor | None = None,
        qkv: Tensor | None = None,
    ) -> Tensor:
        """``residual + sum of gate * branch``, in the residual's dtype; gates ``(B, 1, .., 1, C)``."""
        for gate, branch in zip(gates, self.branches(x, rope, qkv), strict=True):
            residual = add(residual, gate, branch)
        return residual

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        first, *others = self.branches(x, rope)
        return sum(others, first)


def make_mixer(spec: BlockSpec, grid: tuple[int, ...], index: int = 0) -> TokenMixer:
    """The token mixer of a block, by its row in :data:`iwin_dit.layers.specs.MIXERS`.

    Args:
        grid: that the model is made for; others are valid input.
        index: number of the block.

    Raises:
        ValueError: where the mixer does not take grids of so many axes.
    """
    spec.mixer.check_rank(grid)
    return pkgutil.resolve_name(spec.mixer.kind.implementation)(spec, grid, index)


def add(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``residual + gate * branch`` in the residual's dtype."""
    return torch.addcmul(residual, gate.to(residual.dtype), branch.to(residual.dtype))
