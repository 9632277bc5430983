"""Sigmas and timesteps that a call of a pipeline names, as those of diffusers' own pipelines do."""

import pytest
import torch
from conftest import make_model, make_vae

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer3DModel, IwinDiTVideoPipeline
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.sampling import set_timesteps

FLOW, NOISE = FlowMatching(), DDPM()
SIGMAS, TIMESTEPS = [1.0, 0.9, 0.55, 0.2], [999, 800, 450, 20, 0]


def make_pipeline(objective, sampler, shift=None, **options):
    outputs = 4 * objective.kind.outputs
    options |= {"prediction_type": objective.prediction_type, "out_channels": outputs}
    scheduler = objective.scheduler(sampler, shift)
    if "sample_frames" in options:
        model = IwinDiTTransformer3DModel(
            **options, sample_size=8, in_channels=4, num_layers=1, num_classes=3
        )
        pipeline = IwinDiTVideoPipeline(model.eval(), make_vae(), scheduler)
    else:
        pipeline = IwinDiTPipeline(make_model(**options), make_vae(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    """Latents, and the timesteps about which the model was asked."""
    asked = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs: asked.append(float(inputs[1]))
    )
    options = {"guidance_scale": 1.0, "output_type": "latent"} | options
    found = pipeline([1], generator=torch.Generator().manual_seed(0), **options)[0]
    hook.remove()
    return found, asked


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("frames", [{}, {"sample_frames": 2}])
def test_a_flow_steps_from_sigma_to_sigma(shift, frames):
    """Euler's steps written out; the scheduler's shift comes after, as in diffusers."""
    pipeline = make_pipeline(FLOW, "euler", shift, **frames)
    found, asked = draw(pipeline, sigmas=SIGMAS)
    times = [shift * s / (1 + (shift - 1) * s) for s in SIGMAS]
    assert asked == pytest.approx([1000 * t for t in times], rel=1e-6)
    x = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], 0.0], strict=True):
            x = x + (after - t) * pipeline.transformer(x, 1000 * t, torch.tensor([1])).sample
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["euler", "euler_maruyama", "unipc"])
def test_each_sampler_of_flows_that_takes_sigmas(sampler):
    pipeline = make_pipeline(FLOW, sampler)
    assert draw(pipeline, sigmas=SIGMAS)[1] == pytest.approx([1000 * s for s in SIGMAS], abs=2e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_each_sampler_of_noise_that_takes_timesteps(sampler):
    assert draw(make_pipeline(NOISE, sampler), timesteps=TIMESTEPS)[1] == TIMESTEPS


@pytest.mark.parametrize(
    ("objective", "sampler", "key"), [(FLOW, "euler", "sigmas"), (FLOW, "euler_maruyama", "sigmas")]
)
def test_the_usual_ones_change_nothing(objective, sampler, key):
    pipeline = make_pipeline(objective, sampler)
    usual = (set_timesteps(pipeline.scheduler, 6, "cpu") / 1000).tolist()
    expected, _ = draw(pipeline, num_inference_steps=6)
    torch.testing.assert_close(draw(pipeline, **{key: usual})[0], expected)
    assert pipeline.num_timesteps == 6


@pytest.mark.parametrize(
    ("objective", "sampler", "options", "message"),
    [
        (FLOW, "heun", {"sigmas": SIGMAS}, "FlowMatchHeunDiscreteScheduler does not take sigmas; flows take"),
        (FLOW, "dpm++", {"sigmas": SIGMAS}, "DPMSolverMultistepScheduler does not take sigmas"),
        (FLOW, "euler", {"timesteps": TIMESTEPS}, "EulerDiscreteScheduler does not take timesteps"),
        (NOISE, "ddim", {"timesteps": TIMESTEPS}, "DDIMScheduler does not take timesteps"),
        (NOISE, "ddpm", {"sigmas": SIGMAS}, "DDPMScheduler does not take sigmas"),
        (FLOW, "euler", {"sigmas": SIGMAS, "timesteps": TIMESTEPS}, "does not take sigmas and timesteps"),
        (FLOW, "euler", {"sigmas": []}, r"sigmas are \[\], expected descending numbers in \(0, 1\]"),
        (FLOW, "euler", {"sigmas": [1.0, 1.0]}, "expected descending numbers in"),
        (FLOW, "euler", {"sigmas": [1.5, 1.0]}, "expected descending numbers in"),
        (FLOW, "euler", {"sigmas": [1.0, float("nan")]}, "expected descending numbers in"),
        (
            NOISE,
            "ddpm",
            {"timesteps": [1000, 2]},
            "timesteps are .*expected descending numbers whole, from 999",
        ),
        (NOISE, "ddpm", {"timesteps": [500.5, 2]}, "expected descending numbers whole, from 999 to 0"),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused(objective, sampler, options, message):
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(objective, sampler), **options)
