"""How many stacked blocks it takes until every token depends on every other.

Read off the Jacobians of the mixers themselves: MLPs, norms and modulation act on each token alone.

Legend: N tokens of the grid, C channels.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import make_mixer

MOST_BLOCKS = 16  # beyond, tokens count as never connected
ALTERNATING = 2  # every second block of Swin is another one


def dependencies(spec: BlockSpec, grid: tuple[int, ...], index: int = 0) -> Tensor:
    """Which tokens the output of a block's mixer depends on, row by row: booleans ``(N, N)``.

    A token depends on itself in any case, by the residual. In float64, where what is masked or never read
    has a derivative of exactly zero; the weights are random ones of two narrow heads.

    Args:
        spec: of the block; width and heads are replaced.
        index: number of the block.
    """
    count = prod(grid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = make_mixer(replace(spec, width=8, heads=2), grid, index).double()
        x = torch.randn(1, *grid, 8, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(8, dtype=torch.float64)
    outputs = (mixer(x) @ weights).flatten()  # (N,)
    rows = [torch.autograd.grad(output, x, retain_graph=True)[0] for output in outputs]
    reads = torch.stack(rows).view(count, count, 8).ne(0).any(-1)
    return reads | torch.eye(count, dtype=torch.bool)


def blocks_to_connect(spec: BlockSpec, grid: tuple[int, ...], most: int = MOST_BLOCKS) -> int | None:
    """Stacked blocks after which every token depends on every other; None where ``most`` do not suffice."""
    kinds = [dependencies(spec, grid, index).float() for index in range(ALTERNATING)]
    reached = torch.eye(prod(grid))
    for index in range(most):
        reached = (kinds[index % ALTERNATING] @ reached).clamp(max=1)
        if reached.all():
            return index + 1
    return None
