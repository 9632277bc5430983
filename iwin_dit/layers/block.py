"""The transformer block of a DiT: adaptive layer norm around a token mixer and an MLP.

Source: Peebles & Xie 2023, section 3.2.

Legend: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from iwin_dit.layers.norm import NORMS
from iwin_dit.layers.specs import BlockSpec, MlpName, NormName
from iwin_dit.layers.token_mixer import add, make_mixer
from iwin_dit.layers.value_residual import ValueResidual


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


class Modulation(nn.Module):
    """The condition's shifts, scales and gates, by name: ``(B, D) -> {name: (B, 1, .., 1, D)}``."""

    def __init__(self, width: int, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(width, len(self.names) * width)

    def forward(self, condition: Tensor, rank: int) -> dict[str, Tensor]:
        modulation = self.linear(F.silu(condition))
        chunks = modulation[(slice(None), *[None] * rank)].chunk(len(self.names), dim=-1)
        return dict(zip(self.names, chunks, strict=True))


class Head(nn.Module):
    """From tokens to a prediction: a norm, its modulation by the condition, and a projection."""

    def __init__(self, norm: NormName, width: int, outputs: int):
        super().__init__()
        self.norm_out = NORMS[norm](width)
        self.modulation_out = Modulation(width, ["shift", "scale"])
        self.proj_out = nn.Linear(width, outputs)


class Block(nn.Module):
    """``x + gate * mixer(norm(x) (1 + scale) + shift)``, then the same with the MLP.

    x ``(B, *grid, D)`` is the residual stream, always float32; the branches compute in the condition's dtype.
    With ``spec.post_norm``, ``x + gate * (norm(mixer(x)) (1 + scale) + shift)`` (Swin V2). With
    ``spec.value_residual`` the first block returns the values of its attention, too, which others read.

    Args:
        grid: that the model is made for.
        index: number of the block.
    """

    def __init__(self, spec: BlockSpec, grid: tuple[int, ...], index: int = 0):
        super().__init__()
        self.spec = spec
        self.keeps_values = spec.value_residual and index == 0
        self.norm_1 = NORMS[spec.norm](spec.width)
        self.mixer = make_mixer(spec, grid, index)
        self.norm_2 = NORMS[spec.norm](spec.width)
        self.mlp = MLPS[spec.mlp](spec.width, spec.mlp_hidden)
        parts = ("shift", "scale", "gate") if spec.modulation_shift else ("scale", "gate")
        further_gates = [f"gate_1_{branch}" for branch in range(2, self.mixer.num_branches + 1)]
        self.mixer_gates = ["gate_1", *further_gates]  # one for each branch
        names = [f"{part}_{half}" for half in (1, 2) for part in parts]
        self.modulation = Modulation(spec.width, [*names, *further_gates])
        self.value_residual = ValueResidual() if spec.value_residual and index else None

    def forward(
        self, x: Tensor, condition: Tensor, rope: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The residual stream ``(B, *grid, D)``, of the first of several with a value residual (x, values).

        Args:
            x: residual stream ``(B, *grid, D)``.
            condition: ``(B, D)``.
            rope: angles ``(*grid, d/2)``.
            values: of the first block, ``(B, *grid, D)``, where there is a value residual.
        """
        chunks = self.modulation(condition, rank=x.ndim - 2)
        shift_1, scale_1 = chunks.get("shift_1"), chunks["scale_1"]
        shift_2, scale_2 = chunks.get("shift_2"), chunks["scale_2"]
        gates_1 = [self._gate(chunks[name]) for name in self.mixer_gates]
        gate_2 = self._gate(chunks["gate_2"])

        y = x.to(scale_1.dtype) if self.spec.post_norm else self.norm_1(x, shift_1, scale_1)
        qkv, values = self._project(y, values)
        if self.spec.post_norm:
            for gate, branch in zip(gates_1, self.mixer.branches(y, rope, qkv), strict=True):
                x = add(x, gate, self.norm_1(branch, shift_1, scale_1))
            x = add(x, gate_2, self.norm_2(self.mlp(x.to(scale_2.dtype)), shift_2, scale_2))
        else:
            x = self.mixer.add_branches(x, y, gates_1, rope, qkv)
            del y, qkv  # before the MLP needs memory
            x = add(x, gate_2, self.mlp(self.norm_2(x, shift_2, scale_2)))
        return (x, values) if self.keeps_values and values is not None else x

    def _project(self, x: Tensor, values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Queries, keys and values where the block makes them for the mixer, and the first block's values."""
        if self.keeps_values:
            qkv = self.mixer.project(x)
            return qkv, qkv[..., -self.spec.width :]
        if self.value_residual is None or values is None:
            return None, None
        return self.value_residual(self.mixer.project(x), values), values

    def _gate(self, gate: Tensor) -> Tensor:
        """In half precision ``1 + gate`` would have nothing between 1 and 1.008."""
        return 1 + gate.float() if self.spec.open_gates else gate
