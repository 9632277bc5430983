"""AdamW, its warm-up, and its state as named tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

# What has the shape of matrices and is none: embeddings, and what a relative position adds to attention's
# scores, a table (Swin) or a network and a temperature (Swin V2, which leave them without decay, too).
UNDECAYED = frozenset(("label_embedding", "bias_table", "bias_network", "logit_scale"))


def learning_rate(step: int, options: Any, max_steps: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to ``min_learning_rate`` at the last step.

    Args:
        options: an :class:`~iwin_dit.config.schema.OptimizerConfig`.
        max_steps: the length of the run; a constant rate does not depend on it, so such a run, and no other,
            may be made longer (:func:`iwin_dit.build.trainer.build_run`).
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step < warmup or options.schedule == "constant":
        return peak * min(1.0, (step + 1) / (warmup + 1))
    low, done = options.min_learning_rate, min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters; weight decay acts on matrices and kernels, not on biases, norms or UNDECAYED."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and UNDECAYED.isdisjoint(name.split("."))
        (matrices if decays else others).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_adamw(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW over groups of parameters; a group's ``lr_scale`` multiplies its learning rate.

    The fused kernel: the fastest, and the one that leaves everything as it was where ``found_inf`` says so,
    without asking the host. Its state exists from the start, so that a checkpoint's can be copied into it.
    """
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
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
