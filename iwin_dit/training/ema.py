"""The exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """``ema = decay ema + (1 - decay) model``, by lerp: multiply and add would drift."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
