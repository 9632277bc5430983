"""Objectives and samplers against closed forms, torch.distributions and diffusers' own tables."""

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal, kl_divergence

from iwin_dit.diffusion.ddpm import DDPM, discretized_gaussian_log_likelihood, gaussian_kl, tables
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.guidance import Guidance
from iwin_dit.diffusion.sampling import check_scheduler, set_timesteps, split_sigma, step_arguments
from iwin_dit.diffusion.specs import BETAS, ObjectiveConfig

MEAN, STD = 0.7, 0.3  # of the data in the closed forms below
SHAPE = (400, 2, 3, 3)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(n, seed=1):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def best_velocity(x, timestep, labels=None, **_):
    """E[noise - x0 | x_t] for data from N(MEAN, STD^2): linear regression of one Gaussian on another."""
    t = (torch.as_tensor(timestep) / 1000).view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return SimpleNamespace(sample=-MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN))


def best_noise(x, timestep, labels=None, **_):
    """E[noise | x_t] for the same data, and the smallest variance (v = -1)."""
    alpha_bar = DDPMScheduler(**BETAS).alphas_cumprod[torch.as_tensor(timestep).long()].view(-1, 1, 1, 1)
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    eps = (1 - alpha_bar).sqrt() / variance * (x - alpha_bar.sqrt() * MEAN)
    return SimpleNamespace(sample=torch.cat([eps, -torch.ones_like(eps)], dim=1))


@pytest.mark.parametrize("cosine_weight", [0.0, 1.0])
def test_flow_loss_of_a_perfect_model_is_zero(cosine_weight):
    x0, noise = draw(5, 2, 3, 3), draw(5, 2, 3, 3, seed=3)
    objective = FlowMatching(ObjectiveConfig(cosine_weight=cosine_weight))
    loss = objective.loss(lambda *_: SimpleNamespace(sample=noise - x0), x0, None, noise, uniform(5))
    torch.testing.assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)


def test_flow_loss_is_that_of_the_definition():
    x0, noise, u = draw(5, 2, 3, 3), draw(5, 2, 3, 3, seed=3), uniform(5)
    seen = {}

    def model(x, timestep, labels):
        seen.update(x=x, timestep=timestep)
        return SimpleNamespace(sample=2 * x)

    config = ObjectiveConfig(time_sampling="uniform", cosine_weight=0.5)
    loss = FlowMatching(config).loss(model, x0, None, noise, u)
    for i, t in enumerate(u.tolist()):
        xt = (1 - t) * x0[i] + t * noise[i]
        target = noise[i] - x0[i]
        cosine = (2 * xt * target).sum(0) / ((2 * xt).norm(dim=0) * target.norm(dim=0))
        expected = ((2 * xt - target) ** 2).mean() + 0.5 * (1 - cosine).mean()
        torch.testing.assert_close(loss[i], expected)
        assert seen["timestep"][i] == pytest.approx(1000 * t)


@pytest.mark.parametrize(
    ("options", "mean", "std"), [({}, 0, 1), (dict(logit_mean=0.4, logit_std=1.5), 0.4, 1.5)]
)
def test_logit_normal_times_have_their_distribution(options, mean, std):
    """P(t < s) = Phi((logit(s) - mean) / std)."""
    u = (torch.arange(10_000) + 0.5) / 10_000
    t = FlowMatching(ObjectiveConfig(**options)).times(u)
    assert (t.diff() > 0).all()
    for s in (0.1, 0.5, 0.9):
        expected = Normal(mean, std).cdf(torch.tensor(math.log(s / (1 - s))))
        assert (t < s).float().mean() == pytest.approx(expected.item(), abs=1e-3)


def test_ddpm_tables_are_those_of_diffusers():
    scheduler = DDPMScheduler(**BETAS)
    at = tables(torch.device("cpu"))
    torch.testing.assert_close(at.sqrt_alpha_bar**2, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-6)
    variances = [scheduler._get_variance(t, variance_type="fixed_small") for t in range(1, 1000)]
    torch.testing.assert_close(
        at.posterior_log_variance[1:].exp(), torch.stack(variances), rtol=1e-3, atol=1e-7
    )


def test_ddpm_noises_as_diffusers_does():
    x0, noise, u = draw(*SHAPE), draw(*SHAPE, seed=3), uniform(SHAPE[0])
    seen = {}

    def model(x, timestep, labels):
        seen.update(x=x, timestep=timestep)
        return SimpleNamespace(sample=torch.cat([noise, torch.zeros_like(noise)], 1))

    DDPM().loss(model, x0, None, noise, u)
    assert seen["timestep"].dtype == torch.int64
    assert 0 <= seen["timestep"].min() < 20
    assert 980 < seen["timestep"].max() <= 999
    torch.testing.assert_close(seen["x"], DDPMScheduler(**BETAS).add_noise(x0, noise, seen["timestep"]))


def test_timesteps_are_equally_likely_and_the_last_is_999():
    u = torch.tensor([0.0, 0.00099, 0.00101, 0.5, 0.99899, 0.9991, 1 - 2**-24, 1.0])  # 1 in half precision
    assert DDPM().times(u).tolist() == [0, 0, 1, 500, 998, 999, 999, 999]


def test_variational_terms_are_those_of_torch_distributions():
    mean_1, mean_2, log_1, log_2 = draw(4, 50)
    expected = kl_divergence(Normal(mean_1, (log_1 / 2).exp()), Normal(mean_2, (log_2 / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean_1, log_1, mean_2, log_2), expected)

    x = torch.linspace(-1, 1, 256)  # the middles of the bins: their probabilities add up to one
    for mean in (-0.8, 0.2, 0.8):  # with much beyond the first and the last bin
        log_likelihood = discretized_gaussian_log_likelihood(x, torch.tensor(mean), torch.tensor(-0.5))
        assert log_likelihood.exp().sum() == pytest.approx(1, abs=1e-4)
        normal = Normal(mean, math.exp(-0.5))
        expected = (normal.cdf(x[100] + 1 / 255) - normal.cdf(x[100] - 1 / 255)).log()
        torch.testing.assert_close(log_likelihood[100], expected, rtol=1e-3, atol=1e-3)
    impossible = discretized_gaussian_log_likelihood(torch.zeros(1), torch.tensor(0.9), torch.tensor(-9.0))
    assert impossible.item() == pytest.approx(math.log(1e-12)), "not minus infinity"


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_variational_bound_is_that_of_bayes(t):
    """The posterior by Bayes' rule in float64; the model's variance by diffusers, which samples with it."""
    x0, noise = draw(1, 2, 3, 3), draw(1, 2, 3, 3, seed=3)
    output = draw(1, 4, 3, 3, seed=4).clamp(-1, 1)
    eps, v = output.double().chunk(2, dim=1)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    before = abar[t - 1] if t else torch.tensor(1.0)

    def step_back(
        data,
    ):  # N(x_t; sqrt(1 - beta) x, beta) N(x; sqrt(before) x_0, 1 - before), as a function of x
        if not t:
            return data
        precision = (1 - beta[t]) / beta[t] + 1 / (1 - before)
        return (xt * (1 - beta[t]).sqrt() / beta[t] + data * before.sqrt() / (1 - before)) / precision

    xt = abar[t].sqrt() * x0.double() + (1 - abar[t]).sqrt() * noise.double()
    mean = step_back((xt - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt())
    smallest = max(t, 1)
    true_variance = beta[smallest] * (1 - abar[smallest - 1]) / (1 - abar[smallest])
    share = (v + 1) / 2  # of log beta; the rest is of the posterior's log variance
    std = (share * beta[t].log() + (1 - share) * true_variance.log()).mul(0.5).exp()
    if t > 1:
        theirs = DDPMScheduler(**BETAS)._get_variance(t, predicted_variance=v, variance_type="learned_range")
        torch.testing.assert_close(theirs, std.square().log(), rtol=1e-4, atol=1e-4)
    nats = kl_divergence(Normal(step_back(x0.double()), true_variance.sqrt()), Normal(mean, std))
    if not t:
        upper, lower = (Normal(mean, std).cdf(x0.double() + side / 255) for side in (1, -1))
        upper, lower = upper.where(x0 <= 0.999, 1.0), lower.where(x0 >= -0.999, 0.0)
        nats = -(upper - lower).clamp(min=1e-12).log()
    model = lambda *_: SimpleNamespace(sample=output)  # noqa: E731
    loss = DDPM().loss(model, x0, None, noise, torch.tensor([(t + 0.5) / 1000]))
    expected = (eps - noise).square().mean() + nats.mean() / math.log(2)
    torch.testing.assert_close(loss.double(), expected[None], rtol=2e-3, atol=1e-3)


def test_the_variational_bound_trains_the_variance_only():
    x0, noise, u = draw(*SHAPE), draw(*SHAPE, seed=3), uniform(SHAPE[0])
    output = draw(SHAPE[0], 4, 3, 3, seed=4).requires_grad_()
    DDPM().loss(lambda *_: SimpleNamespace(sample=output), x0, None, noise, u).sum().backward()
    mse_gradient = 2 * (output[:, :2] - noise) / noise[0].numel()
    torch.testing.assert_close(output.grad[:, :2], mse_gradient)
    assert (output.grad[:, 2:] != 0).float().mean() > 0.9


def test_the_variational_bound_of_the_true_posterior_is_zero():
    """With the true noise and v = -1 the model's step is the posterior itself at every timestep but 0."""
    x0, noise = draw(*SHAPE), draw(*SHAPE, seed=3)
    u = 0.01 + 0.98 * uniform(SHAPE[0])
    sample = torch.cat([noise, -torch.ones_like(noise)], 1)
    loss = DDPM().loss(lambda *_: SimpleNamespace(sample=sample), x0, None, noise, u)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-4, rtol=0)


def sample_with(scheduler, model, steps, seed=5):
    x = draw(*SHAPE, seed=seed)
    generator = torch.Generator().manual_seed(6)
    for timestep in set_timesteps(scheduler, steps, "cpu"):
        prediction = split_sigma(model(x, timestep.expand(len(x))).sample, x.shape[1], scheduler)
        x = scheduler.step(prediction, timestep, x, **step_arguments(scheduler, generator)).prev_sample
    return x


@pytest.mark.parametrize(
    ("objective", "sampler", "model", "steps"),
    [(FlowMatching(), sampler, best_velocity, 50) for sampler in FlowMatching().samplers]
    + [
        (DDPM(), "ddim", best_noise, 100),
        (DDPM(), "dpm++", best_noise, 50),
        (DDPM(), "ddpm", best_noise, 1000),
    ],
)
def test_every_sampler_turns_the_best_prediction_into_the_data(objective, sampler, model, steps):
    """The schedulers agree with the objectives on time, sign and scale."""
    x = sample_with(objective.scheduler(sampler), model, steps)
    assert x.mean() == pytest.approx(MEAN, abs=0.03)
    assert x.std() == pytest.approx(STD, abs=0.03)


def test_no_euler_step_is_wasted():
    scheduler = FlowMatching().scheduler()
    assert set_timesteps(scheduler, 4, "cpu").tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_schedulers_of_another_objective_are_refused():
    check_scheduler(FlowMatching().scheduler("dpm++"), "flow_prediction")
    check_scheduler(DDPM().scheduler("dpm++"), "epsilon")
    with pytest.raises(
        ValueError, match="DDIMScheduler expects 'epsilon', the model predicts 'flow_prediction'"
    ):
        check_scheduler(DDIMScheduler(), "flow_prediction")
    with pytest.raises(ValueError, match="flow_prediction has no sampler 'ddim'; it has euler, heun"):
        FlowMatching().scheduler("ddim")
    with pytest.raises(ValueError, match="epsilon has no sampler 'euler'; it has ddpm, ddim"):
        DDPM().scheduler("euler")


class Counting:
    """Answers with the label in every channel, and counts the images it is asked about."""

    def __init__(self, channels):
        self.channels, self.asked = channels, 0

    def __call__(self, latents, timestep, labels, return_dict):
        self.asked += len(latents)
        return (labels.view(-1, 1, 1, 1).float().expand(-1, self.channels, *latents.shape[2:]),)


def guide(guidance, channels=4, t=0.5):
    model = Counting(channels)
    prediction = guidance.predict(
        model, torch.zeros(1, 4, 2, 2), torch.tensor(500.0), torch.tensor([3]), 10, t
    )
    return prediction[0, :, 0, 0].tolist(), model.asked


def test_guidance():
    """The class answers 3, the null label 10: guided by 2 that is 10 + 2 (3 - 10) = -4."""
    assert guide(Guidance(1.0)) == ([3, 3, 3, 3], 1)
    assert guide(Guidance(2.0)) == ([-4, -4, -4, -4], 2)
    assert guide(Guidance(2.0, channels=3)) == ([-4, -4, -4, 3], 2)
    assert guide(Guidance(2.0), channels=8) == ([-4] * 4 + [3] * 4, 2), "a learned sigma is not guided"
    assert guide(Guidance(2.0, interval=(0.0, 0.4))) == ([3, 3, 3, 3], 1)
    assert guide(Guidance(2.0, channels=1)) == ([-4, 3, 3, 3], 2)
    assert guide(Guidance(2.0, channels=9), channels=8) == ([-4] * 4 + [3] * 4, 2)
    assert guide(Guidance()) == ([3, 3, 3, 3], 1), "by default none"


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1), (-0.2, -0.1), (1.1, 1.2)])
def test_intervals_that_are_none(interval):
    with pytest.raises(ValueError, match=re.escape(f"guidance_interval is {interval}, expected 0 <= low")):
        Guidance(2.0, interval=interval)


@pytest.mark.parametrize(("thing", "name"), [(Guidance(2.0), "scale"), (FlowMatching().config, "logit_std")])
def test_what_was_checked_cannot_be_changed(thing, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, name, float("nan"))


@pytest.mark.parametrize("channels", [0, -3])
def test_numbers_of_channels_that_are_none(channels):
    with pytest.raises(ValueError, match=f"guidance_channels is {channels}, expected at least 1"):
        Guidance(2.0, channels=channels)


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.25, 0.25), (0.25, 0.75), (0.0, 1.0), (1.0, 1.0)])
def test_an_interval_contains_its_ends(interval):
    guidance = Guidance(2.0, interval=interval)
    for t in (0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0):
        assert guidance.active(t) == (interval[0] <= t <= interval[1])
        assert not Guidance(1.0, interval=interval).active(t)
