"""DDPM with learned sigma, as DiT trains (Ho et al. 2020; Nichol & Dhariwal 2021; Peebles & Xie 2023).

Legend: B batch, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from iwin_dit.diffusion.objective import Objective
from iwin_dit.diffusion.specs import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS, OBJECTIVES


class Tables(NamedTuple):
    """One float32 number per timestep, computed in float64."""

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    log_beta: Tensor
    posterior_log_variance: Tensor
    posterior_x0: Tensor
    posterior_xt: Tensor


@cache
def tables(device: torch.device) -> Tables:
    """Equations 6 and 7 of Ho et al. 2020 for linear betas, computed once for each device.

    The first posterior variance would be zero and takes the value of the next.
    """
    beta = torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    posterior_variance[0] = posterior_variance[1]
    exact = Tables(
        sqrt_alpha_bar=alpha_bar.sqrt(),
        sqrt_one_minus_alpha_bar=(1 - alpha_bar).sqrt(),
        log_beta=beta.log(),
        posterior_log_variance=posterior_variance.log(),
        posterior_x0=beta * previous.sqrt() / (1 - alpha_bar),
        posterior_xt=(1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
    )
    return Tables(*(table.float().to(device) for table in exact))


class DDPM(Objective):
    """``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise``; the model predicts noise and log sigma^2.

    The log sigma^2 takes as many channels again, which say where it lies between its two bounds (Nichol &
    Dhariwal 2021, equation 15).
    """

    kind = OBJECTIVES["ddpm"]

    def times(self, u: Tensor) -> Tensor:
        """Integer timesteps 0..999 from uniform numbers in [0, 1): ``(B,) -> (B,)``."""
        return (u * NUM_TRAIN_TIMESTEPS).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` at the timesteps ``(B,)``."""
        of, sides = tables(x0.device), (-1, *[1] * (x0.ndim - 1))
        return of.sqrt_alpha_bar[t].view(sides) * x0 + of.sqrt_one_minus_alpha_bar[t].view(sides) * noise

    def earlier(self, x0: Tensor, noise: Tensor, u: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        t = (self.times(u) - NUM_TRAIN_TIMESTEPS * gap).clamp(min=0).long()
        return self.noisy(x0, noise, t), t

    def loss(self, model: Callable, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Mean squared error of the noise plus the variational term in bits per dimension: ``(B,)``.

        Arguments as :meth:`Objective.loss`; the model's ``sample`` is ``(B, 2 C, ...)``. The variational
        term learns the variance only: it sees the predicted mean without its gradient.
        """
        t = self.times(u)  # (B,)
        at = Tables(*(table[t].view(-1, *[1] * (x0.ndim - 1)) for table in tables(x0.device)))
        xt = self.noisy(x0, noise, t)

        def error(prediction: Tensor) -> Tensor:
            eps, v = prediction.chunk(2, dim=1)  # (B, C, ...) each
            mse = (eps - noise).square().flatten(1).mean(1)
            return mse + variational_bits(at, x0, xt, eps.detach(), v, t)

        return self.of_heads(model(xt, t, labels), error)


def variational_bits(at: Tables, x0: Tensor, xt: Tensor, eps: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """One term of the variational bound per image, in bits per dimension.

    The divergence of the model's step from the true posterior; at t = 0 the code length of the data (Nichol &
    Dhariwal 2021, equations 4 to 7).
    """
    log_variance = (v + 1) / 2 * at.log_beta + (1 - v) / 2 * at.posterior_log_variance
    predicted_x0 = (xt - at.sqrt_one_minus_alpha_bar * eps) / at.sqrt_alpha_bar
    mean = at.posterior_x0 * predicted_x0 + at.posterior_xt * xt
    true_mean = at.posterior_x0 * x0 + at.posterior_xt * xt
    divergence = gaussian_kl(true_mean, at.posterior_log_variance, mean, log_variance)
    code_length = -discretized_gaussian_log_likelihood(x0, mean, log_variance / 2)
    first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, code_length, divergence).flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """``KL(N(mean_1, variance_1) || N(mean_2, variance_2))`` in nats, elementwise."""
    difference = log_variance_1 - log_variance_2
    return 0.5 * (difference.exp() - 1 - difference + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of x's bin of width 2 / 255, the outermost ones open (Ho et al. 2020, equation 13)."""
    scale = (-log_std).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * scale)
    lower = torch.special.ndtr((x - mean - 1 / 255) * scale)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
