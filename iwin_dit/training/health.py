"""How the blocks of a model are: the size of what comes out of them, and of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from iwin_dit.training.sharding import blocks_of, full


@contextmanager
def watch_blocks(model: nn.Module, active: bool) -> Iterator[dict[str, Tensor]]:
    """Fills the dictionary that it yields with ``activation_rms``, ``(blocks,)``, during forward passes.

    The root mean square of each block's output on this process, of the last micro-batch. Where not
    ``active``, nothing is measured and nothing costs.
    """
    found: dict[str, Tensor] = {}
    if not active:
        yield found
        return
    blocks = blocks_of(model)
    values: dict[int, Tensor] = {}

    def measure(i: int, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        values[i] = output.detach().float().square().mean().sqrt()

    handles = [block.register_forward_hook(partial(measure, i)) for i, block in enumerate(blocks)]
    try:
        yield found
        found["activation_rms"] = torch.stack([values[i] for i in range(len(blocks))])
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weight_rms(model: nn.Module) -> Tensor:
    """The root mean square of each block's parameters: ``(blocks,)``. All processes together."""
    rms = []
    for block in blocks_of(model):
        squares = [full(parameter.square().sum()) for parameter in block.parameters()]
        rms.append((torch.stack(squares).sum() / sum(p.numel() for p in block.parameters())).sqrt())
    return torch.stack(rms)
