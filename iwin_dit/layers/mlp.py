"""The two MLPs of a block: ``(..., C) -> (..., C)``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from iwin_dit.layers.specs import MlpName


class GeluMLP(nn.Module):
    """Linear, GELU (tanh approximation), linear (DiT)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up in one projection (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


MLPS: dict[MlpName, type[nn.Module]] = {"gelu": GeluMLP, "swiglu": SwiGLU}
