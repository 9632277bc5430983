"""Flow matching with a linear path (Lipman et al. 2023; Liu et al. 2023).

Time runs as in diffusers: t = 0 is data, t = 1 is noise.

Legend: B batch, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class FlowMatching:
    """``x_t = (1 - t) x_0 + t noise``; the model predicts the velocity ``noise - x_0``.

    Args:
        time_sampling: ``uniform``, or ``logit_normal`` (Esser et al. 2024, section 3.1).
        logit_mean, logit_std: of the logit-normal density; a positive mean favours noisy times.
        cosine_weight: weight of ``1 - cosine similarity`` over the channels of prediction and target, which
            LightningDiT adds with weight 1 (Yao et al. 2025, section 4).
    """

    time_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    cosine_weight: float = 0.0

    prediction_type = "flow_prediction"
    samplers = ("euler", "heun", "dpm++", "unipc")
    default_sampler = "euler"

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers to times in [0, 1], ``(B,) -> (B,)``: the density's inverse distribution."""
        if self.time_sampling == "uniform":
            return u
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))

    def loss(self, model: Callable, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Loss per image.

        Args:
            model: ``model(hidden_states, timestep, class_labels)`` with a ``sample`` of the shape of ``x0``.
            x0: latents ``(B, C, ...)``.
            labels: ``(B,)``.
            noise: standard normal, of the shape of ``x0``.
            u: ``(B,)``, uniform in [0, 1).

        Returns:
            ``(B,)``: the mean squared error, plus the cosine term.
        """
        t = self.times(u)  # (B,)
        t_ = t.view(-1, *[1] * (x0.ndim - 1))
        target = noise - x0
        prediction = model((1 - t_) * x0 + t_ * noise, NUM_TRAIN_TIMESTEPS * t, labels).sample.float()
        loss = (prediction - target).square().flatten(1).mean(1)
        if self.cosine_weight:
            cosine = F.cosine_similarity(prediction, target, dim=1)  # (B, ...)
            loss = loss + self.cosine_weight * (1 - cosine).flatten(1).mean(1)
        return loss

    def published_scheduler(self) -> SchedulerMixin:
        """That of published models: the same as of new ones."""
        return self.scheduler()

    def scheduler(self, sampler: str | None = None) -> SchedulerMixin:
        """The diffusers scheduler of this name in :attr:`samplers`, set up for velocity prediction."""
        match sampler or self.default_sampler:
            case "euler":
                return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
            case "heun":
                return FlowMatchHeunDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
            case "dpm++":
                return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
            case "unipc":
                return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        raise ValueError(f"flow matching has no sampler {sampler!r}; it has {', '.join(self.samplers)}")
