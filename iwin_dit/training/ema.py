"""Averages of the weights: exponential ones, power functions, and any other from a few after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), section 3 and
appendix C. Times are optimiser steps, counted from 1; a relative standard deviation has no unit.

The average of exponent ``gamma`` at step T weighs the weights of time t by the profile
``p(t) = (gamma + 1) t^gamma / T^(gamma + 1)`` on ``[0, T]``. Its width grows with T, so that the beginning of
training is forgotten; ``std`` is that width divided by T.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import CheckpointError, ConfigError
from iwin_dit.training.sharding import local

AVERAGE = re.compile(r"(ema_std_(\d+(?:\.\d+)?(?:e-\d+)?))\.safetensors")
TOLERANCE = 0.1  # of a profile's distance from the wanted one, as a share of the latter's norm
NEGLIGIBLE = 1e-13  # singular values this far below the largest are rounding: the same average given twice


def power_std(gamma: float) -> float:
    """Width of the profile ``(gamma + 1) tau^gamma`` on [0, 1], by its moments (section 3.1).

    ``std = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))``.
    """
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_gamma(std: float) -> float:
    """The exponent of a profile of relative standard deviation ``std``: :func:`power_std` inverted.

    Squared, that is the cubic ``gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 = 0``. For each
    ``std`` of a profile it has three real roots, of which only the largest is not negative.

    Raises:
        ConfigError: a ValueError, where ``std`` is not in (0, 12^-1/2], the widest being the flat profile.
    """
    widest = power_std(0.0)
    if not 0 < std <= widest:
        raise ConfigError(
            f"found the relative standard deviation {std} of a power-function average, expected one in "
            f"(0, {widest:.4f}]; choose one such as 0.05 or 0.1"
        )
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return max(0.0, float(roots.real.max()))  # rounding may put the root of the flat profile below 0


def power_decay(step: int, gamma: float) -> float:
    """Decay of the update number ``step``: ``beta = (1 - 1 / step)^(gamma + 1)`` (section 3.1).

    With it, the weights of step k count in the average at step T with the integral of the profile over
    ``[k - 1, k]``, ``(k^(gamma + 1) - (k - 1)^(gamma + 1)) / T^(gamma + 1)``: no step is approximated.

    Args:
        step: 1, 2, ...; the first decay is 0, so that the average starts as the weights.
    """
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(
    gamma_a: ArrayLike, step_a: ArrayLike, gamma_b: ArrayLike, step_b: ArrayLike
) -> NDArray[np.float64]:
    """Integral of the product of two profiles (appendix C), of any shapes that broadcast; unit: 1 / step.

    With T the smaller step, ``(ga + 1) (gb + 1) T^(ga + gb + 1) / ((ga + gb + 1) Ta^(ga + 1) Tb^(gb + 1))``.
    """
    gamma_a, step_a, gamma_b, step_b = (
        np.asarray(value, np.float64) for value in (gamma_a, step_a, gamma_b, step_b)
    )
    first = np.minimum(step_a, step_b)
    # one power of the larger step remains when ratios, which are at most 1, have taken up the others
    overlap = (first / step_a) ** gamma_a * (first / step_b) ** gamma_b / np.maximum(step_a, step_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * overlap


def combination(stds: Sequence[float], steps: Sequence[int], std: float, step: int) -> NDArray[np.float64]:
    """Coefficients with which snapshots combine to the average of width ``std`` at ``step`` (section 3.2).

    The sum of the snapshots' profiles is fitted to the wanted profile by least squares, among the
    coefficients whose sum is 1: others would shrink or stretch what all snapshots share, which is most of the
    weights. The fit is good for widths around those stored and at the step of a snapshot: profiles end
    abruptly, and between two snapshots nothing can imitate that end.

    Args:
        stds: relative standard deviation of each snapshot, ``(N,)``.
        steps: step of each, ``(N,)``.

    Returns:
        ``(N,)``, float64.

    Raises:
        ConfigError: a ValueError, for lists that do not fit each other, steps that are not positive, a
            ``step`` that is not between the first and the last snapshot, and widths as :func:`power_gamma`.
    """
    if len(stds) != len(steps) or not len(steps):
        raise ConfigError(f"found {len(stds)} stds and {len(steps)} steps, expected one of each per snapshot")
    first, last = min(steps), max(steps)
    if first < 1:
        raise ConfigError(f"found a snapshot of step {first}, expected steps from 1; remove it")
    if not first <= step <= last:
        raise ConfigError(
            f"found step {step}, expected {first} to {last}: averages outside of the snapshots cannot be "
            "reconstructed; choose the step of a snapshot"
        )
    gammas = np.array([power_gamma(value) for value in stds])
    times = np.array(steps, np.float64)
    gram = inner_product(gammas[:, None], times[:, None], gammas, times)  # (N, N)
    target = inner_product(gammas, times, power_gamma(std), step)  # (N,)
    sides = np.stack([target, np.ones_like(target)], axis=1)
    free, shared = np.linalg.lstsq(gram, sides, rcond=NEGLIGIBLE)[0].T
    return free + shared * (1 - free.sum()) / shared.sum()  # the Lagrange multiplier of the sum


def misfit(stds: Sequence[float], steps: Sequence[int], std: float, step: int) -> float:
    """How far :func:`combination` is from the wanted profile, in the norm of L2; 1 is the profile's own norm.

    Arguments and errors are those of :func:`combination`.
    """
    chosen = combination(stds, steps, std, step)
    gammas, times = np.array([power_gamma(value) for value in stds]), np.array(steps, np.float64)
    wanted = power_gamma(std)
    own = inner_product(wanted, step, wanted, step)
    both = chosen @ inner_product(gammas, times, wanted, step)
    found = chosen @ inner_product(gammas[:, None], times[:, None], gammas, times) @ chosen
    return math.sqrt(max(0.0, float((own - 2 * both + found) / own)))


def _check_reach(stds: Sequence[float], steps: Sequence[int], std: float, step: int) -> None:
    """Refuses a width that the snapshots give only roughly, and says which widths they give."""
    error = misfit(stds, steps, std, step)
    if error <= TOLERANCE:
        return
    widths = np.geomspace(1e-3, power_std(0.0) * (1 - 1e-9), 200)
    reached = [f"{width:.3f}" for width in widths if misfit(stds, steps, width, step) <= TOLERANCE]
    between = f"widths from {reached[0]} to {reached[-1]}" if reached else "no other widths"
    stored = ", ".join(f"{value:g}" for value in sorted(set(stds)))
    raise ConfigError(
        f"an average of relative standard deviation {std} at step {step} would be {error:.0%} off: the "
        f"snapshots ({len(set(steps))} steps, of {stored}) give {between}; choose one of these, or train "
        "with ema.power_stds around it"
    )


def reconstruct(root: Path, std: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of width ``std`` at ``step`` from the snapshots of a run (section 3.2).

    Reads one file at a time; memory holds it and the sum, which is float64.

    Args:
        root: with ``step-00001000/ema_std_0.05.safetensors`` and the like.
        std: relative standard deviation; see :func:`combination` for what can be reached.
        step: by default that of the last snapshot.

    Returns:
        ``{name: tensor}``, float32, on the CPU.

    Raises:
        CheckpointError: where there are no snapshots, one is damaged, or they are not of the same model.
        ConfigError: a ValueError, for a ``std`` or ``step`` that cannot be reconstructed, or only roughly.
    """
    found = []  # the stored averages, oldest first
    for directory in checkpoint.step_directories(root):
        names = filter(None, map(AVERAGE.fullmatch, sorted(checkpoint.verify(directory)["files"])))
        found += [(directory, match[1], float(match[2])) for match in names]
    if not found:
        raise CheckpointError(
            f"found no snapshots of power-function averages below {root}; to reconstruct others, a run needs "
            "ema.power_stds (such as [0.05, 0.1]) and ema.snapshot_every_steps in its config"
        )
    steps, stds = [checkpoint.step_of(directory) for directory, _, _ in found], [std for _, _, std in found]
    step = max(steps) if step is None else step
    coefficients = combination(stds, steps, std, step)
    _check_reach(stds, steps, std, step)
    total: dict[str, Tensor] = {}
    for (directory, name, _), coefficient in zip(found, coefficients.tolist(), strict=True):
        tensors = checkpoint.read_tensors(directory, name, like=total or None, any_precision=True)
        for key, tensor in tensors.items():
            if key not in total:
                total[key] = torch.zeros(tensor.shape, dtype=torch.float64)
            total[key].add_(tensor, alpha=coefficient)
        del tensors, tensor  # before the next file is read
    return {name: value.float() for name, value in total.items()}


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
def ask_ema(ema: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A forward pass of an average, which may be split over the processes, and stays as it is."""
    output = ema(*args, **kwargs)
    if isinstance(ema, FSDPModule):
        ema.reshard()  # whose own weights, those outside the blocks, would wait whole for a backward pass
    return output


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
