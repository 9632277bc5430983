"""The transformer block of a DiT: adaptive layer norm around a token mixer and an MLP.

Source: Peebles & Xie 2023, section 3.2.

Legend: B batch, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from iwin_dit.layers.mixers import MIXERS
from iwin_dit.layers.mlp import MLPS
from iwin_dit.layers.norm import NORMS
from iwin_dit.layers.specs import BlockSpec
from iwin_dit.layers.token_mixer import add


class Modulation(nn.Module):
    """The condition's shifts, scales and gates: ``(B, D) -> chunks x (B, 1, .., 1, D)``."""

    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, condition: Tensor, rank: int) -> tuple[Tensor, ...]:
        modulation = self.linear(F.silu(condition))
        return modulation[(slice(None), *[None] * rank)].chunk(self.chunks, dim=-1)


class Block(nn.Module):
    """``x + gate * mixer(norm(x) (1 + scale) + shift)``, then the same with the MLP.

    x ``(B, *grid, D)`` is the residual stream, always float32; the branches compute in the condition's dtype.
    With ``spec.post_norm``, ``x + gate * (norm(mixer(x)) (1 + scale) + shift)`` (Swin V2).

    Args:
        grid: that the model is made for.
        index: number of the block.
    """

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.spec = spec
        self.norm_1 = NORMS[spec.norm](spec.width)
        self.mixer = MIXERS[spec.mixer.name](spec, grid, index)
        self.norm_2 = NORMS[spec.norm](spec.width)
        self.mlp = MLPS[spec.mlp](spec.width, spec.mlp_hidden)
        # shift (unless left out), scale and gate of attention, the same of the MLP, gates of further branches
        self.modulation = Modulation(
            spec.width, (6 if spec.modulation_shift else 4) + self.mixer.num_branches - 1
        )

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor | None = None) -> Tensor:
        chunks = self.modulation(condition, rank=x.ndim - 2)
        if self.spec.modulation_shift:
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, *branch_gates = chunks
        else:
            (scale_1, gate_1, scale_2, gate_2, *branch_gates), shift_1, shift_2 = chunks, None, None
        gates = gate_1, *branch_gates, gate_2
        if self.spec.open_gates:  # in half precision 1 + gate would have nothing between 1 and 1.008
            gates = [1 + gate.float() for gate in gates]
        *mixer_gates, mlp_gate = gates

        if self.spec.post_norm:
            branches = self.mixer.branches(x.to(scale_1.dtype), rope)
            for gate, branch in zip(mixer_gates, branches, strict=True):
                x = add(x, gate, self.norm_1(branch, shift_1, scale_1))
            return add(x, mlp_gate, self.norm_2(self.mlp(x.to(scale_2.dtype)), shift_2, scale_2))

        x = self.mixer.add_branches(x, self.norm_1(x, shift_1, scale_1), mixer_gates, rope)
        return add(x, mlp_gate, self.mlp(self.norm_2(x, shift_2, scale_2)))
