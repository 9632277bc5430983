"""Shifted times, and networks of flows that predict the data."""

import pytest
import torch
from conftest import make_model, make_vae
from diffusers import FlowMatchEulerDiscreteScheduler

from iwin_dit import IwinDiTPipeline
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.sampling import set_timesteps, times, with_shift
from iwin_dit.diffusion.specs import ObjectiveConfig
from iwin_dit.models.output import DiTOutput

SHIFT = 2.5


def flow(**options):
    return FlowMatching(ObjectiveConfig(**options))


def test_the_times_of_training_are_shifted_as_diffusers_shifts_those_of_sampling():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    u = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0])
    scheduler.set_timesteps(sigmas=u.flip(0).tolist())
    found = flow(time_sampling="uniform", shift=SHIFT).times(u)
    torch.testing.assert_close(found, scheduler.sigmas[:-1].flip(0))
    normal = flow(shift=SHIFT).times(u[:-1])
    logit = torch.log(normal / (1 - normal))
    expected = torch.special.ndtri(u[:-1]) + torch.log(torch.tensor(SHIFT))
    torch.testing.assert_close(logit, expected, msg="a shift of a normal's logits by log a")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_each_sampler_takes_the_shift(sampler):
    """They begin at noise, and take more of their steps there; ``with_shift`` is the same as made with it."""
    kind = flow(shift=SHIFT)
    plain, shifted = FlowMatching().scheduler(sampler), kind.scheduler(sampler)
    changed = with_shift(plain, SHIFT)
    for scheduler in (plain, shifted, changed):
        set_timesteps(scheduler, 8, "cpu")
    assert torch.equal(shifted.sigmas, changed.sigmas)
    inner = slice(1, None, 2 if sampler == "heun" else 1)
    before, after = (torch.tensor(times(scheduler))[inner] for scheduler in (plain, shifted))
    assert times(shifted)[0] == pytest.approx(times(plain)[0], abs=1e-3)
    assert (after > before + 0.01).sum() >= len(before) - 1  # Heun's last one may lie at its least sigma
    if sampler != "heun":
        torch.testing.assert_close(after, SHIFT * before / (1 + (SHIFT - 1) * before), atol=2e-3, rtol=0)


def test_a_shift_is_of_flows():
    with pytest.raises(ValueError, match="DDPMScheduler has no shift"):
        with_shift(DDPM().scheduler(), 2.0)


@pytest.mark.parametrize(
    ("shape", "expected"), [((4, 32, 32), 1.0), ((32, 16, 16), 2**0.5), ((1024, 16, 16), 8.0)]
)
def test_the_automatic_shift_grows_with_the_latent(shape, expected):
    """RAE (arXiv 2510.11690), section 4: sqrt(numbers / 4096)."""
    assert ObjectiveConfig(shift="auto").shift_of(*shape) == pytest.approx(expected)
    assert ObjectiveConfig(shift=3.0).shift_of(*shape) == 3.0


def test_the_loss_of_data_is_that_of_the_velocity():
    """Written out as in JiT: below t = 0.05 both velocities are divided by 0.05."""
    torch.manual_seed(0)
    x0, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    u = torch.tensor([0.01, 0.04, 0.3, 0.9])
    data = torch.randn(4, 2, 3, 3, requires_grad=True)
    seen = {}

    def model(x, timestep, labels):
        seen.update(x=x, timestep=timestep)
        return DiTOutput(sample=data)

    loss = flow(time_sampling="uniform", prediction="data").loss(model, x0, None, noise, u)
    for i, t in enumerate(u.tolist()):
        xt = (1 - t) * x0[i] + t * noise[i]
        torch.testing.assert_close(seen["x"][i], xt)
        divisor = max(t, 0.05)
        expected = (((xt - data[i]) / divisor - (xt - x0[i]) / divisor) ** 2).mean()
        torch.testing.assert_close(loss[i], expected)
    (gradient,) = torch.autograd.grad(loss.sum(), data)
    weight = 2 / (u.clamp(min=0.05) ** 2 * x0[0].numel())
    torch.testing.assert_close(gradient, weight.view(-1, 1, 1, 1) * (data - x0))


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "internal_guidance": 1.4}]
)
def test_a_network_of_data_draws_what_one_of_velocities_draws(options, monkeypatch):
    """The same network, told in the other way: ``x_0 = x_t - t v``, as long as t is at least 0.05."""
    torch.manual_seed(0)
    model = make_model(num_layers=2, prediction_type="sample", base_block=1)
    ours = IwinDiTPipeline(model, make_vae(), FlowMatching().scheduler())
    theirs = IwinDiTPipeline(
        make_model(prediction_type="flow_prediction"), make_vae(), FlowMatching().scheduler()
    )
    theirs.transformer.register_to_config(base_block=1)

    def velocity(latents, timestep, labels, return_dict=True, with_base=False):
        output = model(latents, timestep, labels, with_base=with_base)
        t = timestep / 1000
        parts = {name: (latents - data) / t for name, data in output.items()}
        return DiTOutput(**parts) if return_dict else (parts["sample"],)

    monkeypatch.setattr(theirs.transformer, "forward", velocity)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = dict(num_inference_steps=5, guidance_scale=1.0, output_type="latent") | options
    drawn = [pipeline([0, 1], latents=noise, **options).images for pipeline in (ours, theirs)]
    torch.testing.assert_close(*drawn)


def test_a_network_of_data_goes_with_schedulers_of_flows():
    model = make_model(prediction_type="sample")
    pipeline = IwinDiTPipeline(model, make_vae(), DDPM().scheduler())
    with pytest.raises(ValueError, match="DDPMScheduler expects 'epsilon', the model predicts 'sample'"):
        pipeline([0])
