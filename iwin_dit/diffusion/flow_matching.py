"""Flow matching with a linear path (Lipman et al. 2023; Liu et al. 2023).

Time runs as in diffusers: t = 0 is data, t = 1 is noise.

Legend: B batch, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from iwin_dit.diffusion.objective import Objective
from iwin_dit.diffusion.specs import NUM_TRAIN_TIMESTEPS, OBJECTIVES


class FlowMatching(Objective):
    """``x_t = (1 - t) x_0 + t noise``; the model predicts the velocity ``noise - x_0``.

    Times are uniform or logit-normal (Esser et al. 2024, section 3.1).
    """

    kind = OBJECTIVES["flow_matching"]

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers to times in [0, 1], ``(B,) -> (B,)``: the density's inverse distribution."""
        if self.config.time_sampling == "uniform":
            return u
        return torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(u))

    def loss(self, model: Callable, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The mean squared error, plus the cosine term, per image: ``(B,)``."""
        t = self.times(u)  # (B,)
        t_ = t.view(-1, *[1] * (x0.ndim - 1))
        target = noise - x0
        prediction = model((1 - t_) * x0 + t_ * noise, NUM_TRAIN_TIMESTEPS * t, labels).sample.float()
        loss = (prediction - target).square().flatten(1).mean(1)
        if self.config.cosine_weight:
            cosine = F.cosine_similarity(prediction, target, dim=1)  # (B, ...)
            loss = loss + self.config.cosine_weight * (1 - cosine).flatten(1).mean(1)
        return loss
