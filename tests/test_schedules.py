"""The times of sampling: which are asked about, which are guided, and what another sampler keeps of them."""

from fractions import Fraction
from itertools import pairwise, permutations

import pytest
import torch
from conftest import make_model, make_vae
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from test_diffusion import MEAN, STD, best_noise, best_velocity

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer3DModel, IwinDiTVideoPipeline
from iwin_dit.build.loading import choose_sampler, load_pipeline
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.sampling import published_scheduler, set_timesteps, times
from iwin_dit.runtime.errors import ConfigError

FLOW, NOISE = FlowMatching(), DDPM()
SAMPLERS = [(kind, name) for kind in (FLOW, NOISE) for name in kind.samplers]
IDS = [f"{kind.prediction_type}-{name}" for kind, name in SAMPLERS]


def make_pipeline(objective, scheduler=None, **options):
    channels = 8 if objective is NOISE else 4
    model = make_model(
        prediction_type=objective.prediction_type, out_channels=channels, num_layers=1, **options
    )
    pipeline = IwinDiTPipeline(model, make_vae(), scheduler or objective.scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def answer_with(pipeline, best, seen=None):
    """The transformer answers with the best prediction of a Gaussian, in float64."""

    def forward(latents, timestep, labels, return_dict):
        if seen is not None:
            seen.append((float(timestep), len(latents)))
        times = torch.as_tensor(timestep).double().expand(len(latents))
        return (best(latents.double(), times).sample,)

    pipeline.transformer.forward = forward
    return pipeline


def draw(pipeline, steps, **options):
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = dict(guidance_scale=1.0, output_type="latent", num_inference_steps=steps) | options
    return pipeline([0] * len(noise), latents=noise, **options).images, noise


# -- which times the model is asked about


def test_multistep_solvers_of_flows_ask_about_exact_times():
    """Of a Gaussian the path is known: x(t) scales with the standard deviation of its time."""
    errors = {}
    for name in ("unipc", "dpm++"):
        found, noise = draw(answer_with(make_pipeline(FLOW, FLOW.scheduler(name)), best_velocity), 250)
        errors[name] = float((found - (MEAN + STD * noise)).abs().mean())
    assert errors["unipc"] < 1.5e-5, "5.7e-4 of rounded times"
    assert errors["dpm++"] < 5e-4, "8.9e-4 of rounded times"


@pytest.mark.parametrize(("objective", "name"), SAMPLERS, ids=IDS)
def test_sampling_begins_at_noise(objective, name):
    seen = []
    best = best_velocity if objective is FLOW else best_noise
    found, _ = draw(answer_with(make_pipeline(objective, objective.scheduler(name)), best, seen), 1)
    assert seen[0][0] >= 998.9
    assert found.mean() == pytest.approx(MEAN, abs=0.02), "one step is the mean of the data, no noise"
    assert found.std() < 0.1 or name == "euler_maruyama", "whose last step is for little noise"


def test_saved_and_published_pipelines_keep_their_spacing(tmp_path):
    """Version 0.1 saved schedulers as they are published: their first step is at 1000 - 1000 / N."""
    assert NOISE.scheduler("ddim").config.timestep_spacing == "trailing"
    for kind in (DDIMScheduler(clip_sample=False), published_scheduler(NOISE.prediction_type)):
        pipeline = make_pipeline(NOISE, kind)
        pipeline.save_pretrained(tmp_path / type(kind).__name__)
        loaded = load_pipeline(str(tmp_path / type(kind).__name__))
        assert set_timesteps(loaded.scheduler, 10, "cpu").tolist() == [*range(900, -1, -100)]
        assert times(loaded.scheduler) == [step / 1000 for step in range(900, -1, -100)]
        choose_sampler(loaded, "ddpm" if isinstance(kind, DDIMScheduler) else "ddim")
        assert type(loaded.scheduler) is not type(kind)
        assert set_timesteps(loaded.scheduler, 10, "cpu").tolist() == [*range(900, -1, -100)]


# -- which times are guided


def guided(pipeline, steps, interval, **options):
    """For each call of the model, whether it was guided."""
    asked, model = [], pipeline.transformer

    def forward(latents, timestep, labels, return_dict):
        asked.append(len(latents))
        return (latents.new_zeros(len(latents), model.out_channels, *latents.shape[2:]),)

    model.forward = forward
    options = {"guidance_scale": 3.0, "output_type": "latent"} | options
    pipeline([0], num_inference_steps=steps, guidance_interval=interval, **options)
    return [count == 2 for count in asked]


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "ddpm"])
def test_an_interval_holds_both_its_ends(sampler, steps):
    """Their times are 1, 1 - 1 / N, ..., 1 / N, in exact numbers."""
    objective = FLOW if sampler == "euler" else NOISE
    pipeline = make_pipeline(objective, objective.scheduler(sampler))
    for low, high in ((1, 1), (steps // 5, steps // 2), (steps - 1, steps), (steps // 2, steps // 2)):
        exact = [low <= i <= high for i in range(steps, 0, -1)]
        assert guided(pipeline, steps, (low / steps, high / steps)) == exact, (low, high)
    within = [Fraction(3, 10) <= Fraction(i, steps) <= Fraction(4, 5) for i in range(steps, 0, -1)]
    assert guided(pipeline, steps, (0.3, 0.8)) == within


@pytest.mark.parametrize(("objective", "name"), SAMPLERS, ids=IDS)
def test_a_time_that_is_an_end_is_guided_whatever_the_sampler(objective, name):
    pipeline = make_pipeline(objective, objective.scheduler(name))
    set_timesteps(pipeline.scheduler, 10, "cpu")
    begins = times(pipeline.scheduler)
    begins = [begins[0], *begins[2::2]] if name == "heun" else begins
    for i, end in ((0, 9), (2, 2), (2, 7)):
        low, high = (round(begins[k], 5) for k in (end, i))
        found = guided(pipeline, 10, (low, min(high, 1.0)))
        found = [found[0], *found[2::2]] if name == "heun" else found
        assert found == [i <= k <= end for k in range(10)], (low, high)


def test_clips_are_guided_at_the_same_times():
    options = dict(sample_frames=2, sample_size=8, in_channels=4, num_layers=1, num_attention_heads=2)
    model = IwinDiTTransformer3DModel(**options, attention_head_dim=8, num_classes=3)
    pipeline = IwinDiTVideoPipeline(model.eval(), make_vae(), FLOW.scheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert guided(pipeline, 10, (0.3, 0.8)) == [3 <= i <= 8 for i in range(10, 0, -1)]


def test_both_calls_of_a_step_of_heun_are_guided_or_none():
    """The corrector asks about the time at which the next step begins, beyond an interval's edge."""
    pipeline = make_pipeline(FLOW, FLOW.scheduler("heun"))
    set_timesteps(pipeline.scheduler, 6, "cpu")
    begins = [pipeline.scheduler.timesteps[0], *pipeline.scheduler.timesteps[2::2]]
    for high, low in pairwise(begins):
        edge = float(high + low) / 2000
        for interval in ((edge, 1.0), (0.0, edge)):
            calls = guided(pipeline, 6, interval)
            inside = [interval[0] <= float(t) / 1000 <= interval[1] for t in begins]
            assert calls == [one for one in inside for _ in range(2)][: len(calls)]
            assert any(calls)
            assert not all(calls)


# -- what another sampler keeps


@pytest.mark.parametrize(("before", "after"), permutations(FLOW.samplers, 2))
def test_another_sampler_keeps_the_shift(before, after):
    pipeline = make_pipeline(FLOW)
    first = FLOW.scheduler(before)
    key = "flow_shift" if "flow_shift" in first.config else "shift"
    pipeline.scheduler = type(first).from_config(first.config, **{key: 3.0})
    choose_sampler(pipeline, after)
    assert type(pipeline.scheduler) is type(FLOW.scheduler(after))
    set_timesteps(pipeline.scheduler, 8, "cpu")
    found = torch.tensor(times(pipeline.scheduler))
    if after == "euler":
        unshifted = torch.arange(8, 0, -1) / 8
        torch.testing.assert_close(found.float(), 3 * unshifted / (1 + 2 * unshifted))
    plain = FLOW.scheduler(after)
    set_timesteps(plain, 8, "cpu")
    assert (found[1:-1] > torch.tensor(times(plain))[1:-1]).all(), "noisier times have more steps"


@pytest.mark.parametrize(("before", "after"), permutations(NOISE.samplers, 2))
def test_another_sampler_keeps_the_betas(before, after):
    pipeline, first = make_pipeline(NOISE), NOISE.scheduler(before)
    betas = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipeline.scheduler = type(first).from_config(first.config, **betas)
    choose_sampler(pipeline, after)
    assert type(pipeline.scheduler) is type(NOISE.scheduler(after))
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(pipeline.scheduler.betas.double(), expected, atol=1e-7, rtol=1e-5)
    assert pipeline.scheduler.config.get("clip_sample") in (None, False)


def test_a_schedule_that_cannot_be_kept_is_refused():
    for option in ({"use_dynamic_shifting": True}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}):
        pipeline = make_pipeline(FLOW, FlowMatchEulerDiscreteScheduler(**option))
        (key,) = option
        with pytest.raises(
            ConfigError, match=f"FlowMatchEulerDiscreteScheduler has {key} .* cannot take over"
        ):
            choose_sampler(pipeline, "heun")
        kept = pipeline.scheduler
        choose_sampler(pipeline, "euler")
        assert pipeline.scheduler is kept, "the sampler that it has"
    pipeline = make_pipeline(NOISE, DDPMScheduler(variance_type="learned_range", rescale_betas_zero_snr=True))
    choose_sampler(pipeline, "ddim")
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
