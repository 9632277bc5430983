"""AdamW, its warm-up, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate(step: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up, then constant: a function of the step alone, so that a run may be made longer."""
    return peak * min(1.0, (step + 1) / (warmup_steps + 1))


def build_adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay acts on matrices and kernels, not biases and norm weights."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)


def named_state(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: ``blocks.0.mlp.down.weight/exp_avg``."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_named_state(optimizer: Any, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`named_state`. Counters stay on the CPU, as AdamW keeps them."""
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][part] = value if part == "step" else value.to(parameter.device)
