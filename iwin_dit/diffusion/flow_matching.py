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
from iwin_dit.diffusion.sampling import velocity
from iwin_dit.diffusion.specs import NUM_TRAIN_TIMESTEPS, OBJECTIVES


class FlowMatching(Objective):
    """``x_t = (1 - t) x_0 + t noise``; the model predicts the velocity ``noise - x_0``, or ``x_0``.

    Times are uniform or logit-normal (Esser et al. 2024, section 3.1), then shifted (section 5.3.2). The loss
    is that of the velocity, whatever is predicted: data are weighted by ``1 / t^2`` (JiT, arXiv 2511.13720).
    """

    kind = OBJECTIVES["flow_matching"]

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers to times in [0, 1], ``(B,) -> (B,)``: the density's inverse distribution."""
        options, t = self.config, u
        if options.time_sampling == "logit_normal":
            t = torch.sigmoid(options.logit_mean + options.logit_std * torch.special.ndtri(u))
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` at the times ``(B,)``."""
        t = t.view(-1, *[1] * (x0.ndim - 1))
        return (1 - t) * x0 + t * noise

    def earlier(self, x0: Tensor, noise: Tensor, u: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        t = (self.times(u) - gap).clamp(min=0)
        return self.noisy(x0, noise, t), NUM_TRAIN_TIMESTEPS * t

    def loss(self, model: Callable, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The mean squared error, plus the cosine term, per image: ``(B,)``."""
        t = self.times(u)  # (B,)
        t_ = t.view(-1, *[1] * (x0.ndim - 1))
        xt, target = self.noisy(x0, noise, t), noise - x0
        output = model(xt, NUM_TRAIN_TIMESTEPS * t, labels)
        if self.config.prediction == "data":
            target = velocity(x0, xt, t_)
            return self.of_heads(output, lambda data: self._error(velocity(data, xt, t_), target))
        return self.of_heads(output, lambda prediction: self._error(prediction, target))

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """That of a velocity, per image: ``(B,)``."""
        error = (prediction - target).square().flatten(1).mean(1)
        if self.config.cosine_weight:
            cosine = F.cosine_similarity(prediction, target, dim=1)  # (B, ...)
            error = error + self.config.cosine_weight * (1 - cosine).flatten(1).mean(1)
        return error
