"""Guidance that costs no further pass: diffusers' guiders on the same numbers, and a head inside a model."""

import pytest
import torch
from conftest import make_model, make_vae
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import ClassifierFreeZeroStarGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

from iwin_dit import IwinDiTPipeline
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.guidance import GUIDANCE, AdaptiveProjection, Guidance, zero_star
from iwin_dit.diffusion.specs import ObjectiveConfig
from iwin_dit.models.output import DiTOutput

SCALE = 3.5


def pairs(steps=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 4, 3, 3, generator=generator).unbind() for _ in range(steps)]


def test_zero_star_is_that_of_diffusers():
    theirs = ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=1)
    for step, (better, worse) in enumerate(pairs()):
        theirs.set_state(step=step, num_inference_steps=3, timestep=None)
        expected = theirs.forward(better, worse).pred
        found = zero_star(better, worse, SCALE, t=1 - step / 3)
        torch.testing.assert_close(found, expected)
    assert not zero_star(*pairs()[0], SCALE, t=1.0).any(), "pure noise"


@pytest.mark.parametrize("norm", [15.0, 2.0])
def test_adaptive_projection_is_that_of_diffusers(norm):
    """In the paper's formulation, which counts the scale from 0; the part along the prediction is dropped."""
    ours, average = AdaptiveProjection(momentum=-0.5, norm=norm), MomentumBuffer(-0.5)
    for better, worse in pairs():
        expected = normalized_guidance(
            better, worse, SCALE - 1, average, eta=0.0, norm_threshold=norm, use_original_formulation=True
        )
        torch.testing.assert_close(ours(better, worse, SCALE, 0.5), expected)
    lengths = (better - worse).flatten(1).norm(dim=1)
    assert (lengths > 2).all(), "the smaller bound acts"


class Model:
    """Answers by the label: 3 is no class. Its head inside answers half of it."""

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, latents, timestep, labels, return_dict=True, with_base=False):
        sample = torch.stack([self.answers[label] for label in labels.tolist()])
        return (
            DiTOutput(sample=sample, base=0.5 * sample if with_base else None) if return_dict else (sample,)
        )


def predict(guidance, t=0.5, channels=4):
    torch.manual_seed(0)
    answers = torch.randn(4, channels, 3, 3)
    latents, labels = torch.zeros(2, 4, 3, 3), torch.tensor([0, 2])
    return guidance.predict(Model(answers), latents, torch.tensor(500.0), labels, 3, t), answers


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_guided_prediction_gets_its_deviation_back(share):
    found, answers = predict(Guidance(SCALE, rescale=share))
    better, worse = answers[[0, 2]], answers[[3, 3]]
    guided = worse + SCALE * (better - worse)
    torch.testing.assert_close(found, rescale_noise_cfg(guided, better, share))


def test_internal_guidance_comes_before_the_other():
    """base + s (full - base) with base = full / 2, on both halves; then w + g (b - w)."""
    alone, answers = predict(Guidance(internal_scale=1.5))
    torch.testing.assert_close(alone, 1.25 * answers[[0, 2]])
    both, _ = predict(Guidance(SCALE, internal_scale=1.5))
    worse = 1.25 * answers[[3, 3]]
    torch.testing.assert_close(both, worse + SCALE * (1.25 * answers[[0, 2]] - worse))
    outside, _ = predict(Guidance(SCALE, internal_scale=1.5, interval=(0.6, 1.0)))
    torch.testing.assert_close(outside, answers[[0, 2]])


def test_a_learned_sigma_is_the_models_own():
    found, answers = predict(Guidance(SCALE, internal_scale=1.5), channels=8)
    torch.testing.assert_close(found[:, 4:], answers[[0, 2], 4:])


def make_pipeline(objective=None, **options):
    objective = objective or FlowMatching()
    outputs = 4 * objective.kind.outputs
    torch.manual_seed(0)
    options = {
        "num_layers": 3,
        "prediction_type": objective.prediction_type,
        "out_channels": outputs,
    } | options
    pipeline = IwinDiTPipeline(make_model(**options), make_vae(), objective.scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = dict(num_inference_steps=3, guidance_scale=1.0, output_type="latent") | options
    return pipeline([0, 1], latents=noise, generator=torch.Generator().manual_seed(2), **options).images


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM()], ids=["flow", "ddpm"])
def test_the_head_inside_reads_the_tokens_after_its_block(objective):
    """As a model that ends there: the later blocks are taken out, and the heads change places."""
    pipeline = make_pipeline(objective, base_block=2)
    model = pipeline.transformer
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.tensor([0, 3])
    output = model(*inputs, with_base=True)
    assert model(*inputs).base is None, "nobody asked"
    torch.testing.assert_close(model.train()(*inputs).base, output.base)
    model.eval()
    cut = make_pipeline(objective, num_layers=2).transformer
    state = {
        name: t for name, t in model.state_dict().items() if not name.startswith(("blocks.2", "base_head"))
    }
    state |= model.base_head.state_dict()
    cut.load_state_dict(state)
    torch.testing.assert_close(output.base, cut(*inputs).sample)
    assert not torch.allclose(output.base, output.sample)


def test_a_scale_of_one_is_the_plain_model():
    pipeline = make_pipeline(base_block=1)
    plain = draw(pipeline)
    torch.testing.assert_close(draw(pipeline, internal_guidance=1.0), plain)
    assert not torch.allclose(draw(pipeline, internal_guidance=1.5), plain)
    base = pipeline.transformer.base_head
    pipeline.transformer.base_head = None
    torch.testing.assert_close(draw(pipeline), plain)
    pipeline.transformer.base_head = base


@pytest.mark.parametrize(
    "objective",
    [FlowMatching(ObjectiveConfig(base_weight=0.7)), DDPM(ObjectiveConfig(base_weight=0.7))],
    ids=["flow", "ddpm"],
)
def test_the_loss_of_the_head_inside_is_weighted(objective):
    """The loss is linear in the weight, and the gradient of the head inside is that of its own error."""
    model = make_pipeline(objective, base_block=1).transformer.train()
    torch.manual_seed(3)
    x0, noise, labels, u = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 4, 8, 8),
        torch.tensor([0, 1]),
        torch.rand(2),
    )
    total = objective.loss(model, x0, labels, noise, u)
    plain = type(objective)(ObjectiveConfig(base_weight=0.0)).loss(model, x0, labels, noise, u)

    def swapped(*arguments):
        output = model(*arguments)
        return DiTOutput(sample=output.base)

    base = objective.loss(swapped, x0, labels, noise, u)
    torch.testing.assert_close(total, plain + 0.7 * base)
    gradient = torch.autograd.grad(total.sum(), model.base_head.proj_out.weight)[0]
    swapped_loss = objective.loss(swapped, x0, labels, noise, u).sum()
    expected = torch.autograd.grad(swapped_loss, model.base_head.proj_out.weight)[0]
    torch.testing.assert_close(gradient, 0.7 * expected)
    assert expected.any()


def test_what_does_not_fit_is_refused():
    plain = make_pipeline()
    with pytest.raises(ValueError, match=r"internal_guidance is 1.5, but the model has no head inside"):
        draw(plain, internal_guidance=1.5)
    with pytest.raises(ValueError, match="guidance is 'best', expected one of cfg, cfg_zero_star, apg"):
        draw(plain, guidance="best")
    with pytest.raises(ValueError, match="guidance_rescale is 2, expected a share from 0 to 1"):
        draw(plain, guidance_rescale=2)
    with pytest.raises(ValueError, match="cfg_zero_star is for models of flows"):
        draw(make_pipeline(DDPM()), guidance="cfg_zero_star", guidance_scale=2.0)
    for block in (0, 3):
        with pytest.raises(
            ValueError, match=f"base_block is {block}, expected a number of blocks from 1 to 2"
        ):
            make_pipeline(base_block=block)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_each_kind_of_guidance_draws(guidance):
    pipeline = make_pipeline()
    first, again = (draw(pipeline, guidance_scale=SCALE, guidance=guidance) for _ in range(2))
    assert torch.equal(first, again), "nothing is left over from the call before"
    assert torch.isfinite(first).all()
    if guidance != "cfg":
        assert not torch.allclose(first, draw(pipeline, guidance_scale=SCALE))
