"""Autoguidance, and what a sampling loop must not do: wait for the device, or be compiled again and again."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import make_model, make_vae
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer3DModel
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.guidance import Guidance
from iwin_dit.layers.specs import MIXERS
from iwin_dit.runtime.seeds import generator

FLOW = "flow_prediction"
SAMPLERS = [(kind, name) for kind in (FlowMatching(), DDPM()) for name in kind.samplers]


def make_pipeline(scheduler=None, **options):
    options = {"prediction_type": FLOW} | options
    pipeline = IwinDiTPipeline(make_model(**options), make_vae(), scheduler or FlowMatching().scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_guide(**options):
    return make_model(**{"num_layers": 1, "attention_head_dim": 4, "prediction_type": FLOW} | options)


def noise(batch=3):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def latents_of(pipeline, labels=(0, 2, 1), **options):
    options = dict(num_inference_steps=4, guidance_scale=2.5, output_type="latent") | options
    return pipeline(list(labels), latents=noise(len(labels)), **options).images


class Answering:
    """A constant in every channel; counts the images that it is asked about."""

    def __init__(self, answer, channels=4):
        self.answer, self.channels, self.asked = answer, channels, 0

    def __call__(self, latents, timestep, labels, return_dict):
        assert labels.tolist() == [3], "the guide is asked about the same class"
        self.asked += len(latents)
        return (torch.full((len(latents), self.channels, *latents.shape[2:]), float(self.answer)),)


@pytest.mark.parametrize(
    ("guidance", "channels", "expected", "asked"),
    [  # the model answers 3, its guide 10: by 2 that is 10 + 2 (3 - 10) = -4
        (Guidance(2.0), 4, [-4] * 4, (1, 1)),
        (Guidance(2.0, channels=3), 4, [-4, -4, -4, 3], (1, 1)),
        (Guidance(2.0), 8, [-4] * 4 + [3] * 4, (1, 1)),
        (Guidance(1.0), 4, [3] * 4, (1, 0)),
        (Guidance(2.0, interval=(0.0, 0.4)), 4, [3] * 4, (1, 0)),
    ],
    ids=["all channels", "three channels", "a learned sigma is the model's", "scale 1", "not its time"],
)
def test_a_guide_is_left_behind(guidance, channels, expected, asked):
    model, guide = Answering(3, channels), Answering(10, channels)
    arguments = torch.zeros(1, 4, 2, 2), torch.tensor(500.0), torch.tensor([3])
    prediction = guidance.predict(model, *arguments, null_label=None, t=0.5, guide=guide)
    assert prediction[0, :, 0, 0].tolist() == expected
    assert (model.asked, guide.asked) == asked


@torch.no_grad()
def test_the_pipeline_follows_the_equation():
    """Euler's steps and w D_1 + (1 - w) D_0 (Karras et al. 2024, section 3) written out; no null label."""
    pipeline, guide = make_pipeline(class_dropout_prob=0.0), make_guide(class_dropout_prob=0.0)
    x, labels, steps, w = noise(), torch.tensor([0, 2, 1]), 4, 2.5
    for i in range(steps):
        t = 1 - i / steps
        guided = w if 0.3 <= t <= 0.8 else 1
        times = torch.full((3,), 1000 * t)
        v = guided * pipeline.transformer(x, times, labels).sample
        x = x - (v + (1 - guided) * guide(x, times, labels).sample) / steps
    found = latents_of(pipeline, guide=guide, guidance_interval=(0.3, 0.8))
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match=f"guidance_scale is {scale}, expected a finite number"):
        Guidance(scale)


def test_a_model_that_guides_itself_is_unguided():
    pipeline = make_pipeline()
    unguided = latents_of(pipeline, guidance_scale=1.0)
    itself = latents_of(pipeline, guide=pipeline.transformer, guidance_scale=7.0)
    torch.testing.assert_close(itself, unguided, atol=1e-4, rtol=1e-4)
    guided = latents_of(pipeline, guide=make_guide())
    assert (guided - unguided).abs().max() > 0.1
    assert (guided - latents_of(pipeline)).abs().max() > 0.1, "nor is it guidance by the null label"


def make_clips():
    return IwinDiTTransformer3DModel(
        **dict(sample_frames=2, sample_size=8, in_channels=4, num_layers=1, num_attention_heads=2),
        **dict(attention_head_dim=8, num_classes=3, prediction_type=FLOW),
    )


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda: make_guide(in_channels=8), "the guide's in_channels is 8, expected 4, as of the model"),
        (lambda: make_guide(num_classes=5), "the guide's num_classes is 5, expected 3"),
        (
            lambda: make_guide(prediction_type="epsilon"),
            "the guide's prediction_type is epsilon, expected flow_prediction",
        ),
        (make_clips, "the guide's axes of the grid is 3, expected 2"),
        (lambda: make_guide().bfloat16(), "the guide is torch.bfloat16 on cpu, the model torch.float32 on"),
    ],
)
def test_guides_that_do_not_fit_are_refused(guide, message):
    with pytest.raises(ValueError, match="the guide") as error:
        latents_of(make_pipeline(), guide=guide())
    assert message in str(error.value)


def test_a_guide_runs_where_the_offloaded_model_runs(monkeypatch):
    """Offloaded, a model lies on the CPU until it is called; ``meta`` stands for the accelerator here."""
    pipeline = make_pipeline()
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("meta"))
    with pytest.raises(
        ValueError, match=r"the guide is torch.float32 on cpu, the model torch.float32 on meta"
    ):
        latents_of(pipeline, guide=make_guide())
    pipeline._check_guide(make_guide().to("meta"))
    offloaded, _ = cpu_offload_with_hook(make_guide(), torch.device("meta"))
    assert offloaded.device.type == "cpu"
    pipeline._check_guide(offloaded)


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to the device: from memory that is not pinned, each waits for the device.

    Reads of the device's values need no counting: on the device ``meta`` there are none, and they fail.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if function is torch.ops.aten.copy_.default else args[0]
            self.count += source.device.type == "cpu" and result.device.type == "meta"
        return result


# The most copies of a step. diffusers' UniPC puts six numbers on the device and solves for its coefficients
# there, both of which wait; to be rid of that takes a scheduler of our own, which we do not write.
COPIES = {"unipc": 6}


@pytest.mark.parametrize("guided", ["by the null label", "by a guide"])
@pytest.mark.parametrize(("objective", "sampler"), SAMPLERS, ids=lambda value: str(value)[:4])
def test_no_step_waits_for_the_device(objective, sampler, guided):
    """``meta`` stands for a GPU: it computes shapes alone, and whoever asks it for a value gets an error."""
    channels = 8 if isinstance(objective, DDPM) else 4
    options = {"prediction_type": objective.prediction_type, "out_channels": channels}
    pipeline = make_pipeline(objective.scheduler(sampler), **options).to("meta")
    guide = make_guide(**options).to("meta") if guided == "by a guide" else None
    counts, copies = [], Copies()

    def callback(pipe, step, timestep, tensors):
        assert tensors["latents"].device.type == "meta"
        counts.append(copies.count)
        return tensors

    with copies:
        pipeline(
            [0, 1],
            latents=torch.empty(2, 4, 8, 8, device="meta"),
            **dict(num_inference_steps=6, guidance_scale=2.0, guidance_interval=(0.2, 0.9)),
            **dict(output_type="latent", callback_on_step_end=callback, guide=guide),
        )
    assert len(counts) == (11 if sampler == "heun" else 6)
    steps = [after - before for before, after in pairwise(counts)]
    assert max(steps) <= COPIES.get(sampler, 0), steps


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "factorised"])
def test_no_mixer_waits_for_the_device(name):
    model = make_model(mixer={"name": name}, post_norm=name == "swin_v2").to("meta")
    x, time, labels = torch.empty(2, 4, 6, 6), torch.empty(2), torch.zeros(2, dtype=torch.long)
    with Copies() as copies:
        model(x.to("meta"), time.to("meta"), labels.to("meta"))
    assert copies.count == 3, "those of the arguments"


def test_the_loss_waits_for_the_device_once():
    """DDPM's tables are brought there by the first step."""

    def model(x, timestep, labels):
        return SimpleNamespace(sample=torch.cat([x, x], 1))

    x, u = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, device="meta")
    DDPM().loss(model, x, None, x, u)
    with Copies() as copies:
        DDPM().loss(model, x, None, x, u)
    assert copies.count == 0


@pytest.mark.slow
@pytest.mark.parametrize("guided", ["by the null label", "by a guide"])
def test_a_compiled_model_draws_the_same_and_is_compiled_once_a_size(guided):
    """Four sizes: of whole and last batches, each twice as large with guidance; or two of model and guide."""
    pipeline = make_pipeline(num_layers=1)
    guide = make_guide() if guided == "by a guide" else None
    options = dict(guide=guide, guidance_interval=(0.3, 0.8))
    batches = [(0, 1, 2), (2, 1, 0), (1,)] * 2
    expected = [latents_of(pipeline, labels, **options) for labels in batches]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for model in (pipeline.transformer, guide):
        if model is not None:
            model.compile(dynamic=False, backend=counter)
    try:
        for labels, images in zip(batches, expected, strict=True):
            torch.testing.assert_close(latents_of(pipeline, labels, **options), images, atol=1e-4, rtol=1e-4)
        assert counter.frame_count == 4
    finally:
        torch._dynamo.reset()


def test_images_by_a_guide_do_not_depend_on_their_batch():
    pipeline, guide = make_pipeline(), make_guide()
    options = dict(num_inference_steps=3, guidance_scale=2.0, output_type="pt", guide=guide)
    together = pipeline([0, 1], generator=[generator(0), generator(1)], **options).images
    alone = pipeline([1], generator=[generator(1)], **options).images
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=0)
