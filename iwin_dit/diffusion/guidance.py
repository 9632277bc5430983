"""Guidance: classifier-free, by a worse model, and from inside the network, in an interval of time.

All push the prediction away from a worse one: that of the same model without the label (Ho & Salimans 2022),
that of a worse model with the same label (Karras et al. 2024), or that of a head in the middle of the model,
which costs no further pass (Zhou et al. 2025, arXiv 2512.24176). The interval is that of Kynkäänniemi et al.
(2024).

Legend: B batch, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iwin_dit.diffusion.specs import NOISE, NUM_TRAIN_TIMESTEPS, GuidanceName

# Times this close to an end of the interval are at it. Schedulers keep times in float32, whose 0.8 is more
# than 0.8, and UniPC begins at 1 - 1e-6; steps are a hundred times as far apart.
RESOLUTION = 1e-5


Rule = Callable[[Tensor, Tensor, float, float], Tensor]  # of (better, worse, scale, t)


def classifier_free(better: Tensor, worse: Tensor, scale: float, t: float) -> Tensor:
    """``worse + scale (better - worse)`` (Ho & Salimans 2022; Karras et al. 2024, equation 3)."""
    return torch.lerp(worse, better, scale)


def zero_star(better: Tensor, worse: Tensor, scale: float, t: float) -> Tensor:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): the worse prediction is projected on the better one.

    The first step, from pure noise, is not taken (section 4.2): its velocity is zero. DPM++ begins at 0.999.
    """
    if t >= 1 - 1 / NUM_TRAIN_TIMESTEPS - RESOLUTION:
        return torch.zeros_like(better)
    axes = tuple(range(1, better.ndim))
    share = (better * worse).sum(axes, keepdim=True) / (worse.square().sum(axes, keepdim=True) + 1e-8)
    return torch.lerp(share * worse, better, scale)


class AdaptiveProjection:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), for the steps of one image.

    ``better + (scale - 1) u``, where u is the part of ``better - worse`` that is orthogonal to ``better``,
    with a momentum over the steps and a bound of its norm.

    Args:
        momentum: of the differences; a negative one pushes each step away from the ones before.
        norm: the largest of a difference.
    """

    def __init__(self, momentum: float = -0.5, norm: float = 15.0):
        self.momentum, self.norm = momentum, norm
        self.average: Tensor | float = 0.0

    def __call__(self, better: Tensor, worse: Tensor, scale: float, t: float) -> Tensor:
        self.average = difference = better - worse + self.momentum * self.average
        axes = tuple(range(1, better.ndim))
        length = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
        difference = difference * (self.norm / length).clamp(max=1)
        direction = F.normalize(better.flatten(1), dim=1).view_as(better)
        orthogonal = difference - (difference * direction).sum(axes, keepdim=True) * direction
        return better + (scale - 1) * orthogonal


GUIDANCE: dict[GuidanceName, Callable[[], Rule]] = {  # makes the rule of one call of a pipeline
    "cfg": lambda: classifier_free,
    "cfg_zero_star": lambda: zero_star,
    "apg": AdaptiveProjection,
}


@dataclass(frozen=True)
class Guidance:
    """How far, where and when the worse prediction is left behind.

    Args:
        scale: 1 is the plain conditional model, in one forward pass; above, the prediction is pushed away
            from the worse one.
        channels: guide the first so many latent channels only; 3 reproduces the published figures of DiT, SiT
            and LightningDiT. Default: all.
        interval: (low, high) of t in [0, 1], with t = 1 noise, both ends included; outside, the model runs
            unguided in one pass.
        internal_scale: of the guidance from inside: ``base + internal_scale (prediction - base)``, where base
            is the prediction of the head after ``base_block`` blocks; 1 is without. It comes first.
        rescale: share of a guided prediction that gets back the standard deviation of the unguided one (Lin
            et al. 2024, section 3.4).
        path_drop: the prediction without a class is made without the blocks in the middle, too, which costs
            less (SPRINT, Park et al. 2025, arXiv 2510.21986).
        rule: how better and worse become the guided prediction, of :data:`GUIDANCE`.
    """

    scale: float = 1.0
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    internal_scale: float = 1.0
    rescale: float = 0.0
    path_drop: bool = False
    rule: Rule = field(default=classifier_free)

    def __post_init__(self) -> None:
        for name, scale in (("guidance_scale", self.scale), ("internal_guidance", self.internal_scale)):
            if not math.isfinite(scale):
                raise ValueError(f"{name} is {scale}, expected a finite number; 1 is without guidance")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.rescale}, expected a share from 0 to 1")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval is ({low}, {high}), expected 0 <= low <= high <= 1 (t = 1 is noise)"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(
                f"guidance_channels is {self.channels}, expected at least 1, or None for all channels"
            )

    def check(self, model: Mapping[str, Any], has_guide: bool) -> None:
        """Raises ValueError where a model of this config cannot be guided so.

        Args:
            has_guide: whether another model is the worse one.
        """
        if self.scale != 1 and not has_guide and model["class_dropout_prob"] <= 0:
            raise ValueError(
                f"guidance_scale is {self.scale}, but the model was trained without a null label "
                "(class_dropout_prob 0): only guidance_scale 1, or a guide, is possible"
            )
        if self.internal_scale != 1 and model["base_block"] is None:
            raise ValueError(
                f"internal_guidance is {self.internal_scale}, but the model has no head inside "
                "(base_block): only 1 is possible"
            )
        if self.rule is zero_star and model["prediction_type"] == NOISE:
            raise ValueError(
                "guidance cfg_zero_star is for models of flows, this one predicts noise; take apg"
            )
        if self.path_drop and (has_guide or model["dense_blocks"] is None):
            why = "a guide is the worse model" if has_guide else "the model has none (dense_blocks)"
            raise ValueError(f"path_drop leaves out blocks in the middle, but {why}: only False is possible")

    def active(self, t: float) -> bool:
        """Whether a step at time t is guided."""
        low, high = self.interval
        guides = self.scale != 1 or self.internal_scale != 1
        return guides and low - RESOLUTION <= t <= high + RESOLUTION

    def predict(
        self,
        model: Callable,
        latents: Tensor,
        timestep: Tensor,
        labels: Tensor,
        null_label: int | None,
        t: float,
        guide: Callable | None = None,
    ) -> Tensor:
        """The guided prediction.

        Args:
            model: ``model(hidden_states, timestep, class_labels, return_dict=False)``; with internal guidance
                ``model(..., with_base=True)`` has ``sample`` and ``base``; with path-drop guidance it takes
                ``skip_middle=True``.
            latents: noisy ``(B, C, ...)``.
            timestep: of the model, a scalar.
            labels: ``(B,)``.
            null_label: that of no class; it is not needed with a guide.
            t: the time in [0, 1] at which the step begins: both calls of a step of Heun share it.
            guide: a smaller or less trained model, whose prediction for the same labels is the worse one.
                Without it, that is the model's own for the null label, in one pass with the other.

        Returns:
            ``(B, C, ...)``, or ``(B, 2 C, ...)`` with a learned sigma, which is the model's own, unguided.
        """
        if not self.active(t):
            return model(latents, timestep, labels, return_dict=False)[0]
        if self.scale == 1:
            return self._from_inside(model, latents, timestep, labels)
        if guide is None:
            if null_label is None:
                raise ValueError("guidance needs a model with a null label, or a guide")
            nulls = torch.full_like(labels, null_label)
            if self.path_drop:
                better = self._from_inside(model, latents, timestep, labels)
                worse = self._from_inside(model, latents, timestep, nulls, skip_middle=True)
            else:
                labels = torch.cat([labels, nulls])
                both = self._from_inside(model, torch.cat([latents, latents]), timestep, labels)
                better, worse = both.chunk(2)
        else:
            better = self._from_inside(model, latents, timestep, labels)
            worse = guide(latents, timestep, labels, return_dict=False)[0]
        channels = latents.shape[1] if self.channels is None else min(self.channels, latents.shape[1])
        unguided = better[:, :channels]
        guided = self.rule(unguided, worse[:, :channels], self.scale, t)
        if self.rescale:
            axes = tuple(range(1, guided.ndim))
            ratio = unguided.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8)
            guided = torch.lerp(guided, guided * ratio, self.rescale)
        return torch.cat([guided, better[:, channels:]], dim=1)

    def _from_inside(
        self, model: Callable, latents: Tensor, timestep: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        """The model's prediction, pushed away from that of the head inside it; a learned sigma stays."""
        if self.internal_scale == 1:
            return model(latents, timestep, labels, return_dict=False, **options)[0]
        output, channels = model(latents, timestep, labels, with_base=True, **options), latents.shape[1]
        base, sample = (prediction[:, :channels] for prediction in (output.base, output.sample))
        return torch.cat([torch.lerp(base, sample, self.internal_scale), output.sample[:, channels:]], dim=1)
