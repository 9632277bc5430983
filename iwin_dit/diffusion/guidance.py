"""Classifier-free guidance (Ho & Salimans 2022) and autoguidance (Karras et al. 2024) in an interval of time.

Both push the prediction away from a worse one: away from the same model's without the label, or away from
that of a worse model with the same label. The interval is Kynkäänniemi et al.'s (2024).

Legend: B batch, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Times this close to an end of the interval are at it. Schedulers keep times in float32, whose 0.8 is more
# than 0.8, and UniPC begins at 1 - 1e-6; steps are a hundred times as far apart.
RESOLUTION = 1e-5


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
    """

    scale: float = 1.0
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(
                f"guidance_scale is {self.scale}, expected a finite number; 1 is without guidance"
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval is ({low}, {high}), expected 0 <= low <= high <= 1 (t = 1 is noise)"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(
                f"guidance_channels is {self.channels}, expected at least 1, or None for all channels"
            )

    def active(self, t: float) -> bool:
        """Whether a step at time t needs the worse prediction."""
        low, high = self.interval
        return self.scale != 1 and low - RESOLUTION <= t <= high + RESOLUTION

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
        """The guided prediction, ``worse + scale * (model - worse)`` (Karras et al. 2024, equation 3).

        Args:
            model: ``model(hidden_states, timestep, class_labels, return_dict=False)``.
            latents: noisy ``(B, C, ...)``.
            timestep: of the model, a scalar.
            labels: ``(B,)``.
            null_label: that of no class; of no account with a guide.
            t: the time in [0, 1] at which the step begins: both calls of a step of Heun share it.
            guide: a smaller or less trained model, whose prediction for the same labels is the worse one.
                Without it, that is the model's own for the null label, in one pass with the other.

        Returns:
            ``(B, C, ...)``, or ``(B, 2 C, ...)`` with a learned sigma, which is the model's own, unguided.
        """
        if not self.active(t):
            return model(latents, timestep, labels, return_dict=False)[0]
        if guide is None:
            if null_label is None:
                raise ValueError("guidance needs a model with a null label, or a guide")
            labels = torch.cat([labels, torch.full_like(labels, null_label)])
            both = model(torch.cat([latents, latents]), timestep, labels, return_dict=False)[0]
            better, worse = both.chunk(2)
        else:
            better, worse = (m(latents, timestep, labels, return_dict=False)[0] for m in (model, guide))
        channels = latents.shape[1] if self.channels is None else min(self.channels, latents.shape[1])
        guided = torch.lerp(worse[:, :channels], better[:, :channels], self.scale)
        return torch.cat([guided, better[:, channels:]], dim=1)
