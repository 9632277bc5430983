"""AdamW, its warm-up, and its state as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def learning_rate(step: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up, then constant: a function of the step alone, so that a run may be made longer."""
    return peak * min(1.0, (step + 1) / (warmup_steps + 1))


def build_adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay acts on matrices and kernels, not biases and norm weights.

    The fused kernel: the fastest, and the one that leaves everything as it was where ``found_inf`` says so,
    without asking the host. Its state exists from the start, so that a checkpoint's can be copied into it.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    for parameter in (*matrices, *vectors):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, by reference: ``blocks.0.mlp.down.weight/exp_avg``."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
