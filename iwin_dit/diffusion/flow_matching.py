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
from torch import Tensor

from iwin_dit.diffusion.objective import Objective
from iwin_dit.diffusion.specs import NUM_TRAIN_TIMESTEPS, OBJECTIVES


@dataclass(frozen=True)
class FlowMatching(Objective):
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

    kind = OBJECTIVES["flow_matching"]

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers to times in [0, 1], ``(B,) -> (B,)``: the density's inverse distribution."""
        if self.time_sampling == "uniform":
            return u
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))

    def loss(self, model: Callable, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The mean squared error, plus the cosine term, per image: ``(B,)``."""
        t = self.times(u)  # (B,)
        t_ = t.view(-1, *[1] * (x0.ndim - 1))
        target = noise - x0
        prediction = model((1 - t_) * x0 + t_ * noise, NUM_TRAIN_TIMESTEPS * t, labels).sample.float()
        loss = (prediction - target).square().flatten(1).mean(1)
        if self.cosine_weight:
            cosine = F.cosine_similarity(prediction, target, dim=1)  # (B, ...)
            loss = loss + self.cosine_weight * (1 - cosine).flatten(1).mean(1)
        return loss
