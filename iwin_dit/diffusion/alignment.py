"""Alignment: tokens inside a denoiser are drawn towards those of a teacher (REPA, arXiv 2410.06940).

Legend: B batch, C latent channels, Z channels of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from iwin_dit.diffusion.objective import Objective


def misalignment(projected: Tensor, features: Tensor) -> Tensor:
    """``1 - mean over tokens of the cosine`` (REPA), of ``(B, *grid, Z)`` each: ``(B,)``."""
    return 1 - F.cosine_similarity(projected.float(), features.float(), dim=-1).flatten(1).mean(1)


def on_grid(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps ``(B, Z, h, w)`` to ``(B, *grid, Z)`` in float32, bilinear between places."""
    return F.interpolate(features.float(), grid, mode="bilinear", antialias=True).movedim(1, -1)


def spatial_normalization(features: Tensor, share: float) -> Tensor:
    """``(z - share mean z) / (std z + 1e-6)`` over the tokens of each image (iREPA, arXiv 2512.10794).

    What all tokens of an image share is its content; what is left is where things are. ``(B, *grid, Z)``.
    """
    z = features.float()
    axes = tuple(range(1, z.ndim - 1))
    return (z - share * z.mean(axes, keepdim=True)) / (z.std(axes, keepdim=True) + 1e-6)


def second_uniform(u: Tensor) -> Tensor:
    """A second uniform number from the lower 12 of the 24 random bits that ``torch.rand`` gives: ``(B,)``.

    It is exact, and tells nothing of the upper 12 bits, which decide the time.
    """
    return (u * 4096).frac()


def aligned_loss(
    objective: Objective, model: Callable, batch: tuple[Tensor, ...], features: Tensor | None, weight: float
) -> Tensor:
    """The loss of the objective, and ``weight`` times the misalignment: ``(B,)``.

    Args:
        model: its output has ``tokens``, the projected ones.
        batch: ``x0, labels, noise, u`` of :meth:`Objective.loss`.
        features: of the teacher, on the grid of the tokens. None once the alignment has stopped: the
            projector then takes part without a gradient, since processes wait for one of every parameter.
    """
    outputs: list[Any] = []

    def student(*inputs: Tensor) -> Any:
        outputs.append(model(*inputs))
        return outputs[-1]

    loss = objective.loss(student, *batch)
    (output,) = outputs
    if features is None:
        return loss + 0 * output.tokens.float().flatten(1).mean(1)
    return loss + weight * misalignment(output.tokens, features)
