"""The stochastic sampler of flows: its steps are those of SiT and REPA, and it draws what it should."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from test_diffusion import MEAN, STD, best_velocity

from iwin_dit import FlowMatchEulerMaruyamaScheduler
from iwin_dit.build.loading import choose_sampler, load_pipeline
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.sampling import set_timesteps, times
from iwin_dit.diffusion.sde import LAST_STEP


def solve(steps, velocity, x, generators, shift=1.0):
    scheduler = FlowMatching().scheduler("euler_maruyama", shift)
    for timestep in set_timesteps(scheduler, steps, "cpu"):
        x = scheduler.step(velocity(x, timestep), timestep, x, generator=generators).prev_sample
    return x


def seeded(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_its_steps_are_those_of_repa():
    """Written out as their ``euler_maruyama_sampler`` has it, in float64."""

    def velocity(x, t):
        return torch.sin(3 * x) - t * x

    start = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    found = solve(6, lambda x, timestep: velocity(x, timestep / 1000), start, seeded(2))
    x, generators = start.double(), seeded(2)
    t_steps = [*np.linspace(1, 0.04, 6), 0.0]
    for i, (t, after) in enumerate(pairwise(t_steps)):
        v, dt, diffusion = velocity(x, t), after - t, 2 * t
        reverse_alpha_ratio = (1 - t) / -1
        score = (reverse_alpha_ratio * v - x) / (t**2 - reverse_alpha_ratio * t)
        x = x + (v - 0.5 * diffusion * score) * dt
        if i < 5:
            draws = torch.cat([torch.randn(1, 1, 2, 2, generator=generator) for generator in generators])
            x = x + np.sqrt(diffusion) * np.sqrt(-dt) * draws
    torch.testing.assert_close(found, x.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_gaussian_data_keep_their_mean_and_deviation(shift):
    """The model is the best one of a Gaussian: what it draws is known in closed form.

    Before the last step, at t, the deviation is that of the flow; the last step multiplies it by a number.
    """
    t = LAST_STEP * shift / (1 + (shift - 1) * LAST_STEP)
    variance = ((1 - t) * STD) ** 2 + t**2
    mean_step = 1 - t * (t - (1 - t) * STD**2 + t) / variance  # of velocity and noise
    start = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    found = solve(250, lambda x, t: best_velocity(x, t).sample, start, seeded(8), shift)
    assert found.mean() == pytest.approx(MEAN, abs=0.01)
    assert found.std() == pytest.approx(mean_step * variance**0.5, rel=0.01)
    correlation = torch.corrcoef(torch.stack([start.flatten(), found.flatten()]))[0, 1]
    assert abs(correlation) < 0.4, "most of the noise that it began with is forgotten; 1 of a flow"


def test_its_times_end_with_the_last_step():
    scheduler = FlowMatching().scheduler("euler_maruyama")
    set_timesteps(scheduler, 25, "cpu")
    np.testing.assert_allclose(times(scheduler), np.linspace(1, 0.04, 25), atol=1e-6)
    shifted = FlowMatching().scheduler("euler_maruyama", 3.0)
    set_timesteps(shifted, 25, "cpu")
    t = np.linspace(1, 0.04, 25)
    np.testing.assert_allclose(times(shifted), 3 * t / (1 + 2 * t), atol=1e-6)


def test_an_image_is_that_of_its_seed_in_a_saved_pipeline_too(tmp_path):
    pipeline = make_pipeline()
    choose_sampler(pipeline, "euler_maruyama", shift=2.0)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=5, output_type="latent", guidance_scale=2.0)
    both = pipeline([0, 1], generator=seeded(2), **options).images
    alone = pipeline([1], generator=seeded(2)[1], **options).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = load_pipeline(str(tmp_path / "saved"))
    assert type(loaded.scheduler) is FlowMatchEulerMaruyamaScheduler
    assert loaded.scheduler.config.shift == 2.0
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded([0, 1], generator=seeded(2), **options).images, both)
