"""Averages of the weights: exponential ones, and power functions of Karras et al. 2024 (EDM2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from iwin_dit.training.posthoc import power_decay, power_gamma
from iwin_dit.training.sharding import local


def decay_rules(decays: Sequence[float], power_stds: Sequence[float]) -> dict[str, Callable[[int], float]]:
    """``{name: decay(step)}`` for step = 1, 2, ...; the first exponential average is named ``ema``.

    Args:
        decays: of exponential averages.
        power_stds: relative standard deviations of power-function averages.
    """
    rules: dict[str, Callable[[int], float]] = {}
    for i, decay in enumerate(decays):
        rules[f"ema_{decay!r}" if i else "ema"] = partial(_constant, decay)
    for std in power_stds:
        rules[f"ema_std_{std!r}"] = partial(power_decay, gamma=power_gamma(std))
    return rules


def _constant(decay: float, step: int) -> float:
    return decay


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """``ema = decay ema + (1 - decay) model``, by lerp: multiply and add would drift. Buffers are copied."""
    averaged = [local(parameter) for parameter in ema.parameters()]
    weights = [
        local(weight).to(average.device) for weight, average in zip(model.parameters(), averaged, strict=True)
    ]
    torch._foreach_lerp_(averaged, weights, 1 - decay)
    for kept, buffer in zip(ema.buffers(), model.buffers(), strict=True):  # of BatchNorm, averages themselves
        kept.copy_(buffer)
