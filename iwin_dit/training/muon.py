"""Muon for the matrices of blocks, AdamW for everything else.

Sources: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982, section 2.2 (the length of steps).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from iwin_dit.training.sharding import blocks_of, full, local, split_as

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a step of the iteration, and how many steps
STEPS = 5
STACKED = {"qkv": 3, "gate_up": 2}  # projections that are several matrices, one above the other
AT_ONCE = 2**26  # numbers that are orthogonalised together: equal shapes share a product


def matrices_apart(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each split into the matrices of blocks, by of how many they consist, and the rest.

    A matrix is the weight of a linear layer inside a block. Depthwise kernels, biases, norms, tables,
    embeddings and heads are none.
    """
    stacked = stacked_matrices(model)
    split = []
    for group in groups:
        parts: dict[int, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            parts[stacked.get(parameter, 0)].append(parameter)
        split += [group | {"params": part, "stacked": count} for count, part in parts.items()]
    return split


def stacked_matrices(model: nn.Module) -> dict[Tensor, int]:
    """Of how many matrices, one above the other, the weight of each linear layer of a block consists."""
    found: dict[Tensor, int] = {}
    for block in blocks_of(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and "bias_network" not in name:
                whose, _, last = name.rpartition(".")
                outputs = getattr(block.get_submodule(whose), "names", None)  # of a modulation
                found[module.weight] = len(outputs) if outputs else STACKED.get(last, 1)
    return found


def orthogonalize(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1: ``(..., m, n)``, by Newton and Schulz.

    Five steps of ``X <- a X + (b X X' + c (X X')^2) X`` from ``X / |X|`` leave values of about 0.7 to 1.2.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(Optimizer):
    """Matrices take steps of one length in all directions, ``0.2 sqrt(max(m, n))`` times the rate.

    That is the root mean square of AdamW's steps, so that its learning rate and weight decay stay. A matrix
    keeps one buffer, a momentum with Nesterov's look ahead, where AdamW keeps two.

    Args:
        groups: of parameters; those with ``stacked``, a number, hold matrices: each consists of so many, one
            above the other, which are orthogonalised apart. The others are AdamW's.
        lr: learning rate of a group that has none.
        betas, eps: of AdamW.
        momentum: of Muon.
    """

    _step_supports_amp_scaling = True  # a step with ``found_inf`` changes nothing, without asking the host

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "stacked": 0})
        others = [group for group in self.param_groups if not group["stacked"]]
        self.adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=True) if others else None
        if self.adamw is not None:  # which has the very groups of this one, and keeps its state here
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step with the gradients that there are."""
        found_inf = getattr(self, "found_inf", None)
        if self.adamw is not None:
            self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
            self.adamw.step()
        for group in self.param_groups:
            if group["stacked"]:
                for parameters in _alike(group["params"]):
                    self._step(parameters, group, found_inf)

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any], found_inf: Tensor | None) -> None:
        """A step of parameters of one shape, whole or split over the processes."""
        rate, momentum = group["lr"], group["momentum"]
        changes: list[tuple[Tensor, Tensor]] = []  # of a tensor, and what it becomes
        directions = []
        for parameter in parameters:
            gradient, state = cast(Tensor, parameter.grad), self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffer = state["momentum_buffer"]
            new = torch.lerp(buffer, gradient, 1 - momentum)
            changes.append((local(buffer), local(new)))
            directions.append(full(torch.lerp(gradient, new, momentum)))
        matrices = torch.stack(directions).unflatten(1, (group["stacked"], -1))  # (P, stacked, m, n)
        length = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        computed_in = torch.bfloat16 if matrices.device.type == "cuda" else matrices.dtype
        steps = orthogonalize(matrices.to(computed_in)).to(matrices.dtype).flatten(1, 2)
        for parameter, step in zip(parameters, steps, strict=True):
            kept = local(parameter) * (1 - rate * group["weight_decay"])
            changes.append((local(parameter), kept - rate * length * local(split_as(step, parameter))))
        for tensor, new in changes:
            tensor.copy_(new if found_inf is None else torch.where(found_inf != 0, tensor, new))


def _alike(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters with a gradient, in lists of one shape that are not too large to be computed together."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape[parameter.shape].append(parameter)
    for shape, alike in by_shape.items():
        count = max(1, AT_ONCE // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))
