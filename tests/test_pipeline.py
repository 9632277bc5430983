"""The pipeline: labels, seeds, guidance, sizes, and the ways to load it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_vae
from diffusers import AutoencoderDC, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, dynamic_modules_utils
from safetensors.torch import load_file

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel
from iwin_dit.build import loading
from iwin_dit.build.loading import load_pipeline
from iwin_dit.data.codec import decode, encode
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.pipelines.sampling import draw_grid, open_folder, sample_classes, write_samples
from iwin_dit.runtime.errors import CheckpointError, DataError
from iwin_dit.runtime.seeds import generator

SMALL_DC = dict(
    **dict(latent_channels=4, attention_head_dim=8, scaling_factor=1.0),
    **dict(encoder_block_types="ResBlock", decoder_block_types="ResBlock"),
    **dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8)),
    **dict(encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1)),
    **dict(encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ())),
)
NAMES = {0: "white shark, Carcharodon carcharias", 1: "golden retriever", 2: "umbrella"}


def make_pipeline(scheduler=None, model=None, vae=None, **options):
    pipeline = IwinDiTPipeline(
        model or make_model(prediction_type="flow_prediction"),
        vae or make_vae(),
        scheduler or FlowMatching().scheduler(),
        id2label=NAMES,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline, labels, seeds=None, **options):
    seeds = range(len(labels)) if seeds is None else seeds
    options = dict(num_inference_steps=3, guidance_scale=2.0, output_type="pt") | options
    return pipeline(labels, generator=[generator(seed) for seed in seeds], **options).images


def test_ids_and_names_can_be_mixed():
    pipeline = make_pipeline()
    assert pipeline.get_label_ids([2, "golden retriever", "Carcharodon carcharias", "UMBRELLA", "1"]) == [
        2,
        1,
        0,
        2,
        1,
    ]
    assert pipeline.get_label_ids("white shark, Carcharodon carcharias") == [0]
    assert pipeline.get_label_ids(torch.tensor([1, 2])) == [1, 2]
    assert (
        pipeline.get_label_ids(np.array([1, 2])) == pipeline.get_label_ids(list(np.array([1, 2]))) == [1, 2]
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "class 3 is out of range: this model has 3 classes, 0 to 2"),
        (-1, "class -1 is out of range"),
        ("-1", "class -1 is out of range"),
        ("²", "unknown class name '²'"),
        ("--3", "unknown class name '--3'"),
        (3.7, "class 3.7 is neither a whole number nor a name"),
        (None, "class None is neither a whole number nor a name"),
        ("golden retreiver", "unknown class name 'golden retreiver'; nearest names: golden retriever"),
        ("zzz", "unknown class name 'zzz'; the model has 3 classes, such as"),
    ],
)
def test_bad_labels_are_explained_before_the_model_runs(label, message):
    pipeline = make_pipeline()
    pipeline.transformer.forward = None
    with pytest.raises(ValueError, match="class") as error:
        pipeline([label])
    assert message in str(error.value)


@pytest.mark.parametrize("scheduler", [FlowMatching().scheduler(), DDPM().scheduler("ddpm")])
def test_an_image_does_not_depend_on_its_batch(scheduler):
    """Stochastic samplers too: each image draws from its own generator."""
    sigma = isinstance(scheduler, DDPMScheduler)
    pipeline = make_pipeline(scheduler, make_model(out_channels=8 if sigma else 4))
    together = images_of(pipeline, [0, 1, 2, 1])
    for i, label in enumerate([0, 1, 2, 1]):
        torch.testing.assert_close(images_of(pipeline, [label], [i])[0], together[i], atol=1e-4, rtol=0)
    assert not torch.allclose(together[1], together[3])


def test_images_are_what_the_vae_decodes():
    """The latents' normalisation is undone, and the range is [0, 1]."""
    mean, std = [0.5, -0.5, 1.0, 0.0], [2.0, 1.0, 0.5, 3.0]
    pipeline = make_pipeline(latents_mean=mean, latents_std=std)
    latents = images_of(pipeline, [1], output_type="latent")
    raw = latents * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1)
    expected = (decode(pipeline.vae, raw) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images_of(pipeline, [1]), expected)
    plain = make_pipeline()
    expected = (decode(plain.vae, images_of(plain, [1], output_type="latent") / 0.18215) / 2 + 0.5).clamp(
        0, 1
    )
    torch.testing.assert_close(images_of(plain, [1]), expected)


def test_output_types():
    pipeline = make_pipeline()
    pt = images_of(pipeline, [1])
    array = images_of(pipeline, [1], output_type="np")
    picture = images_of(pipeline, [1], output_type="pil")[0]
    np.testing.assert_allclose(array[0], pt[0].movedim(0, -1).numpy())
    np.testing.assert_array_equal(np.asarray(picture), (array[0] * 255).round().astype(np.uint8))
    assert isinstance(pipeline([1], num_inference_steps=1, return_dict=False), tuple)
    with pytest.raises(ValueError, match="output_type is 'jpeg', expected"):
        pipeline([1], output_type="jpeg")


def test_other_sizes():
    pipeline = make_pipeline()
    assert images_of(pipeline, [1], height=24, width=40).shape == (1, 3, 24, 40)
    for height in (25, 0, -32):
        with pytest.raises(ValueError, match=f"height is {height}, expected a multiple of 2"):
            pipeline([1], height=height)


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="class_labels is empty"):
        make_pipeline()([])


def test_what_is_not_finite_is_no_image():
    """It would be black; latents are given as they are."""
    pipeline = make_pipeline()
    torch.nn.init.constant_(pipeline.transformer.label_embedding.weight[1], torch.nan)
    assert images_of(pipeline, [1], output_type="latent").isnan().any()
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(
            DataError, match="transformer's latents are not finite; its weights are not usable in float32"
        ):
            images_of(pipeline, [0, 1], output_type=output_type)
    assert images_of(pipeline, [0]).isfinite().all()


def overflowing_vae(**config):
    """Its activations are beyond float16's largest number, as those of SDXL's autoencoder."""
    vae = make_vae()
    vae.register_to_config(**config)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 3e5
        vae.encoder.conv_in.weight *= 3e5
    return vae


@pytest.mark.parametrize("move", ["to dtype", "to device and dtype", "keyword", "loaded so"])
def test_an_autoencoder_that_may_not_compute_in_float16_stays_in_float32(move, tmp_path):
    pipeline = make_pipeline(
        vae=overflowing_vae(force_upcast=True), latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )
    expected = images_of(pipeline, [1])
    weights = pipeline.vae.decoder.conv_in.weight.clone()
    if move == "loaded so":
        pipeline.save_pretrained(tmp_path)
        pipeline = IwinDiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
        pipeline.set_progress_bar_config(disable=True)
    elif move == "to device and dtype":
        pipeline.to("cpu", torch.float16)
    elif move == "keyword":
        pipeline.to(dtype=torch.float16)
    else:
        pipeline.to(torch.float16)
    assert pipeline.transformer.dtype == torch.float16
    torch.testing.assert_close(images_of(pipeline, [1]), expected, atol=0.05, rtol=0)
    assert pipeline.vae.dtype == torch.float32
    if move != "loaded so":
        assert torch.equal(pipeline.vae.decoder.conv_in.weight, weights), "not rounded on the way"
    assert pipeline.config.vae == ("diffusers", "AutoencoderKL"), "what save_pretrained writes"
    assert (
        make_pipeline(vae=overflowing_vae(force_upcast=True)).to(torch.bfloat16).vae.dtype == torch.bfloat16
    )
    assert encode(overflowing_vae(force_upcast=True).half(), torch.rand(1, 3, 16, 16)).isfinite().all()


def test_the_message_names_who_was_not_finite():
    pipeline = make_pipeline(vae=overflowing_vae(force_upcast=False)).to(torch.float16)
    with pytest.raises(
        DataError, match=r"autoencoder's pixels are not finite in float16, .* take bfloat16 or"
    ):
        images_of(pipeline, [1])
    assert images_of(pipeline, [1], output_type="latent").isfinite().all()
    torch.nn.init.constant_(pipeline.transformer.proj_out.bias, torch.inf)
    with pytest.raises(DataError, match=r"transformer's latents are not finite; .* not usable in float16"):
        images_of(pipeline, [1])


def test_components_make_the_same_pipeline(tmp_path):
    pipeline = make_pipeline(latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    again = IwinDiTPipeline(**pipeline.components)
    again.set_progress_bar_config(disable=True)
    assert again.transformer is pipeline.transformer
    assert again.id2label == NAMES
    assert torch.equal(images_of(again, ["umbrella"]), images_of(pipeline, ["umbrella"]))
    again.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == json.loads(saved_index(pipeline, tmp_path / "other"))
    loaded = load_pipeline(str(ROOT / "tests" / "data" / "pipeline_0.1"))
    twice = IwinDiTPipeline(**loaded.components)
    twice.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(twice, [1]), images_of(loaded, [1]))


def saved_index(pipeline, folder):
    pipeline.save_pretrained(folder)
    return (folder / "model_index.json").read_text()


def test_tensors_that_a_callback_cannot_have_are_refused_before_the_first_step():
    pipeline, called = make_pipeline(), []
    options = dict(callback_on_step_end=lambda *_: called.append(1) or {})
    with pytest.raises(
        ValueError, match="callback_on_step_end_tensor_inputs has prompt, expected only latents"
    ):
        images_of(pipeline, [1], callback_on_step_end_tensor_inputs=["latents", "prompt"], **options)
    assert not called


@pytest.mark.parametrize("vae", [make_vae, lambda: AutoencoderDC(**SMALL_DC)], ids=["KL", "DC"])
def test_from_pipe_takes_everything_over(vae, tmp_path):
    pipeline = make_pipeline(vae=vae(), latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    again = IwinDiTPipeline.from_pipe(pipeline)
    assert again.transformer is pipeline.transformer
    assert again.vae is pipeline.vae
    assert again.id2label == NAMES
    assert again.config.latents_std == [1.5] * 4
    again.save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path)).vae) is type(pipeline.vae)
    torch.testing.assert_close(images_of(again, [1]), images_of(pipeline, [1]))


def count_passes(pipeline, **options):
    asked = []
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda latents, *a, **k: (
        asked.append(len(latents)),
        forward(latents, *a, **k),
    )[1]
    pipeline([0], num_inference_steps=4, **options)
    pipeline.transformer.forward = forward
    return asked


def test_guidance_costs_a_second_image_only_where_it_acts():
    pipeline = make_pipeline()
    assert count_passes(pipeline, guidance_scale=1.0) == [1] * 4
    assert count_passes(pipeline, guidance_scale=3.0) == [2] * 4
    assert count_passes(pipeline, guidance_scale=3.0, guidance_interval=(0.3, 0.8)) == [1, 2, 2, 1]


def test_guidance_needs_a_null_label():
    pipeline = make_pipeline(model=make_model(class_dropout_prob=0.0))
    assert pipeline([1], guidance_scale=1.0, num_inference_steps=1).images
    with pytest.raises(ValueError, match="trained without a null label"):
        pipeline([1], guidance_scale=2.0)


def test_a_scheduler_of_another_objective_is_refused():
    with pytest.raises(
        ValueError, match="DDIMScheduler expects 'epsilon', the model predicts 'flow_prediction'"
    ):
        make_pipeline(DDIMScheduler())([1])


def test_a_callback_sees_and_changes_the_latents():
    pipeline, seen = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), pipe.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = images_of(pipeline, [1], output_type="latent", callback_on_step_end=callback)
    assert [s for s, _, _ in seen] == [0, 1, 2]
    assert not latents.any()


def test_grids_and_folders(tmp_path):
    pipeline = make_pipeline()
    samples = list(sample_classes(pipeline, [2, 0], 3, seed=0, batch_size=4, num_inference_steps=1))
    assert [(s.label, s.number) for s in samples] == [(2, 0), (2, 1), (2, 2), (0, 0), (0, 1), (0, 2)]
    assert draw_grid(samples, NAMES).height == 2 * 66
    assert draw_grid(samples, NAMES, columns=2).height == 4 * 66
    assert open_folder(tmp_path / "out", {"seed": 0}) == set()
    assert write_samples(samples, tmp_path / "out") == 6
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names[:2] == ["0000-00000.png", "0000-00001.png"]
    assert names[-1] == "recipe.json"
    assert len(names) == 7


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel
assert isinstance(pipeline, IwinDiTPipeline), type(pipeline)
assert isinstance(pipeline.transformer, IwinDiTTransformer2DModel), type(pipeline.transformer)
generator = torch.Generator().manual_seed(3)
images = pipeline(["umbrella"], generator=generator, num_inference_steps=2, output_type="pt").images
torch.save(images, sys.argv[2])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pipeline = make_pipeline(latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    folder = tmp_path_factory.mktemp("ünï code") / "pipeline"
    export_pipeline(pipeline, folder, {"step": 3})
    export_pipeline(pipeline, folder, {"step": 4})  # replaces the first
    expected = pipeline(
        ["umbrella"], generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type="pt"
    ).images
    return folder, expected


def test_an_export_is_complete(exported):
    folder, _ = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "IwinDiTPipeline"]
    assert index["transformer"] == ["iwin_dit", "IwinDiTTransformer2DModel"]
    assert "_name_or_path" not in index
    assert (folder / "transformer" / f"diffusion_pytorch_{SAFETENSORS_WEIGHTS_NAME}").exists() or list(
        (folder / "transformer").glob("*.safetensors")
    )
    assert json.loads((folder / "recipe.json").read_text())["step"] == 4
    assert [p.name for p in folder.parent.iterdir()] == ["pipeline"], "nothing is left behind"


def test_diffusers_loads_an_export_in_a_process_of_its_own(exported, tmp_path):
    folder, expected = exported
    ended = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "images.pt")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    torch.testing.assert_close(
        torch.load(tmp_path / "images.pt", weights_only=True), expected, atol=1e-5, rtol=0
    )


def test_diffusers_loads_what_save_pretrained_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_pipeline().save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded) is IwinDiTPipeline
    assert loaded.id2label == NAMES
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model_index.json", "pipeline.py", "transformer/iwin_dit.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_a_pipeline_of_the_hub_is_checked_as_a_folder_is(exported, tmp_path, monkeypatch):
    """The hub's cache stands for the hub; weights of what is not ours are not asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--user--digits", "0" * 40
    snapshot = Path(shutil.copytree(exported[0], repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_pipeline("user/digits").id2label == NAMES
    with pytest.raises(CheckpointError, match="user/missing is neither a folder here nor a pipeline on the"):
        load_pipeline("user/missing")

    config = snapshot / "transformer" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"num_layers": 10**9}))
    with pytest.raises(CheckpointError, match="has num_layers 1000000000, expected a whole number from 1"):
        load_pipeline("user/digits")
    config.write_text(before)
    index = snapshot / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"latents_std": [1.0] * 3}))
    with pytest.raises(CheckpointError, match="expected a number for each of the 4 latent channels"):
        load_pipeline("user/digits")
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    monkeypatch.setattr(loading, "check_pipeline_folder", lambda folder: pytest.fail("was fetched"))
    with pytest.raises(CheckpointError, match="holds a StableDiffusionPipeline, expected an IwinDiTPipeline"):
        load_pipeline("user/digits")


def test_a_model_alone_makes_the_round_trip(tmp_path):
    for options in (
        {},
        dict(
            mixer={"name": "global"},
            position_embedding="sincos+rope",
            norm="layer_norm",
            mlp="gelu",
            qk_norm=True,
        ),
        dict(
            modulation_shift=False,
            open_gates=False,
            sample_size=(8, 12),
            patch_size=2,
            mixer={"window_size": [2, 3]},
        ),
    ):
        model = make_model(**options)
        model.save_pretrained(tmp_path)
        again = IwinDiTTransformer2DModel.from_pretrained(tmp_path)
        latents = torch.randn(2, 4, *model.latent_size, generator=torch.Generator().manual_seed(0))
        arguments = (latents, torch.tensor([3, 700]), torch.tensor([0, 3]))
        with torch.no_grad():
            assert torch.equal(model(*arguments).sample, again(*arguments).sample)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        model(latents, torch.tensor([3, 700]), torch.tensor([0, 3])).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(g.any() for g in gradients[0])


def test_a_model_in_half_precision_keeps_its_residual_stream():
    model = make_model()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3])
    with torch.no_grad():
        expected = model(latents, torch.tensor(500.0), labels).sample
        half = model.bfloat16()(latents.bfloat16(), torch.tensor(500.0), labels).sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


def test_43_a_pipeline_of_an_older_version_draws_what_it_drew():
    """tests/data/pipeline_0.1 was written by version 0.1.0, with the images that it drew then."""
    pipeline = load_pipeline(str(ROOT / "tests" / "data" / "pipeline_0.1"))
    expected = load_file(ROOT / "tests" / "data" / "pipeline_0.1_images.safetensors")["images"]
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = dict(num_inference_steps=3, guidance_scale=2.0, output_type="pt")
    found = pipeline([0, 2], generator=seeds, **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
