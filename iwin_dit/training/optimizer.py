"""The optimisers, their warm-up, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from iwin_dit.config.common import OptimizerConfig
from iwin_dit.training.muon import Muon, matrices_apart

Groups = list[dict[str, Any]]  # of parameters; a group's ``lr_scale`` multiplies its learning rate

# From a model, groups of its parameters and the options of a recipe to an optimiser, by ``optimizer.name``.
# Fused ones are the fastest, and leave everything as it was without asking the host where a step is not
# finite.
OPTIMIZERS: dict[str, Callable[[nn.Module, Groups, OptimizerConfig], Optimizer]] = {
    "adamw": lambda model, groups, options: AdamW(
        groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True
    ),
    "muon": lambda model, groups, options: Muon(
        matrices_apart(model, groups), lr=options.learning_rate, betas=options.betas, eps=options.eps
    ),
}

# What has the shape of matrices and is none: embeddings, and what a relative position adds to attention's
# scores, a table (Swin) or a network and a temperature (Swin V2, which leave them without decay, too).
UNDECAYED = frozenset(("label_embedding", "bias_table", "bias_network", "logit_scale"))


def learning_rate(step: int, options: OptimizerConfig, max_steps: int) -> float:
    """Linear warm-up, then constant, or down to ``min_learning_rate`` at the last step, by half a cosine or
    linearly.

    Args:
        options: of the recipe.
        max_steps: the length of the run; a constant rate does not depend on it, so such a run, and no other,
            may be made longer (:func:`iwin_dit.build.trainer.build_run`).
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step < warmup or options.schedule == "constant":
        return peak * min(1.0, (step + 1) / (warmup + 1))
    low, done = options.min_learning_rate, min(1.0, (step - warmup) / (max_steps - warmup))
    share = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (peak - low) * share


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """All parameters; weight decay acts on matrices and kernels, not on biases, norms or UNDECAYED."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and UNDECAYED.isdisjoint(name.split("."))
        (matrices if decays else others).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, groups: Groups, options: OptimizerConfig) -> Optimizer:
    """The optimiser of a recipe. Its state exists from the start, so that a checkpoint's is copied into it.

    Raises:
        TypeError: where its state is not of tensors, which alone a checkpoint keeps.
    """
    optimizer = OPTIMIZERS[options.name](model, groups, options)
    if not optimizer.state:
        make_state(optimizer)
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{options.name} keeps {key} as a {type(value).__name__}, expected a tensor")
    return optimizer


@torch.no_grad()
def make_state(optimizer: Optimizer) -> None:
    """Makes by steps what most optimisers make in their first one: zeros. The parameters stay."""
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        before, parameter.grad = parameter.clone(), torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
        parameter.copy_(before)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def step_if_finite(optimizer: Optimizer, not_finite: Tensor) -> None:
    """Takes a step; where ``not_finite`` is not 0, it changes neither parameters nor state.

    An optimiser that knows ``found_inf``, as PyTorch's fused ones do for its gradient scaler, decides on the
    device. The host decides for any other, and waits for the device in each step.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # so PyTorch's gradient scaler does it
        optimizer.step()
    elif not not_finite:
        optimizer.step()


def named_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, by reference: ``blocks.0.mlp.down.weight/exp_avg``."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
