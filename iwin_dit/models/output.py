"""What the diffusion transformer returns."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor


@dataclass
class DiTOutput(Transformer2DModelOutput):
    """What the model returns beside ``sample``, its prediction.

    base: the prediction of the head inside the model, ``(B, out_channels, [T,] H, W)``, where it is computed.
    tokens: ``(B, *grid, Z)``, projected for the alignment of training.
    """

    base: Tensor | None = None
    tokens: Tensor | None = None
