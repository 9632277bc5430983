"""Models of pixels, which no autoencoder encodes: training, extraction, sampling and their recipes."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal, make_model, read_checkpoint, stopped_before
from PIL import Image
from torch import nn

from iwin_dit import IdentityAutoencoder, IwinDiTPipeline
from iwin_dit.build import data as build_data
from iwin_dit.build.loading import load_pipeline
from iwin_dit.config.parse import parse_arguments
from iwin_dit.data import digits
from iwin_dit.data.codec import decode, encode, latent_channels, load_vae, spatial_factor, vae_statistics
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.layers.embeddings import PatchEmbed
from iwin_dit.runtime.errors import CheckpointError, ConfigError

SIDE = 16
MODEL = {"patch_size": 4, "patch_bottleneck": 6, "sample_size": SIDE, "in_channels": 3}
PIXELS = {"kind": "images", "vae": "none", "normalization": "vae"}
JIT = {"prediction": "data", "logit_mean": 0.8, "logit_std": 0.8}


def picture(rng):
    return Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve images and six clips of two frames, of three classes, by the rank of their models."""
    root, rng = tmp_path_factory.mktemp("pixels"), np.random.default_rng(0)
    for i in range(12):
        path = root / "images" / f"class {i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng).save(path)
    for i in range(6):
        path = root / "clips" / f"class {i % 3}" / f"{i:02d}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng).save(path, save_all=True, append_images=[picture(rng), picture(rng)], duration=100)
    return {2: root / "images", 3: root / "clips"}


@pytest.mark.parametrize("frames", [(), (5,)])
def test_the_identity_is_an_autoencoder_like_others(frames, tmp_path):
    IdentityAutoencoder().save_pretrained(tmp_path / "vae")
    for vae in (load_vae("none"), load_vae(str(tmp_path / "vae"))):
        assert (latent_channels(vae), spatial_factor(vae)) == (3, 1)
        assert vae_statistics(vae) == ([0.0] * 3, [1.0] * 3)
        pixels = torch.rand(2, 3, *frames, 8, 12)
        assert torch.equal(encode(vae, pixels), pixels)
        assert torch.equal(decode(vae, pixels), pixels)
        with pytest.raises(ValueError, match="the latents have 4 channels, expected the 3 of pixels"):
            decode(vae, torch.zeros(1, 4, 8, 8))


def test_a_bottleneck_is_two_convolutions():
    """JiT's BottleneckPatchEmbed: one of the patch without a bias, and one of 1 x 1."""
    torch.manual_seed(0)
    embed = PatchEmbed(3, 10, 4, bottleneck=5)
    first, second = nn.Conv2d(3, 5, 4, 4, bias=False), nn.Conv2d(5, 10, 1)
    first.weight.data = embed.bottleneck.weight.detach().view(5, 3, 4, 4).clone()
    second.weight.data = embed.proj.weight.detach().view(10, 5, 1, 1).clone()
    second.bias.data = embed.proj.bias.detach().clone()
    images, weights = torch.randn(2, 3, 8, 12), torch.randn(2, 2, 3, 10)
    expected = second(first(images)).movedim(1, -1)
    torch.testing.assert_close(embed(images), expected)
    ours = torch.autograd.grad((embed(images) * weights).sum(), [*embed.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [first.weight, *second.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.view_as(one))
    assert "patch_embed.bottleneck.weight" not in make_model().state_dict(), "others stay as they were"


@pytest.mark.parametrize("rank", [2, 3])
def test_pixels_train_resume_and_are_drawn(rank, folders, recipe, train_here, run_here, tmp_path):
    model = MODEL | ({} if rank == 2 else {"sample_frames": 2})
    config = recipe(
        data=PIXELS | {"path": str(folders[rank])},
        model=model | {"mixer": {"window_size": "auto"}},
        objective=JIT,
        train={"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 5, "sample_every_steps": 4},
    )
    code, output = train_here("--config", config)
    assert code == 0, output
    again = stopped_before(tmp_path / "run", 4)
    code, output = train_here("--config", config, "--output_dir", again)
    assert code == 0, output
    assert_equal(read_checkpoint(tmp_path / "run", 4), read_checkpoint(again, 4))

    pipeline = load_pipeline(str(again / "pipeline"))
    assert type(pipeline.vae) is IdentityAutoencoder
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    latents = pipeline([1], output_type="latent", **options)[0]
    options["generator"].manual_seed(0)
    pixels = pipeline([1], output_type="pt", **options)[0]
    shown = latents if rank == 2 else latents.transpose(1, 2)
    torch.testing.assert_close(torch.as_tensor(pixels), (shown / 2 + 0.5).clamp(0, 1))
    out = tmp_path / "samples.png"
    run_here("sample.py", "--checkpoint", again, "--class", "class 1", "--num-images", 1, "--out", out)
    assert out.exists()


def test_pixels_that_were_extracted_train_as_images_do(folders, recipe, run_here, tmp_path):
    run_here(
        *("extract_latents.py", "--images", folders[2], "--vae", "none", "--out", tmp_path / "latents"),
        *("--size", SIDE, "--workers", 0),
    )
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    assert (index["vae"], index["latent_shape"]) == ("none", [3, SIDE, SIDE])
    options = {"model": MODEL, "objective": JIT, "train": {"max_steps": 4, "save_every_steps": 4}}
    for name, source in (
        ("images", PIXELS | {"path": str(folders[2])}),
        ("latents", {"path": str(tmp_path / "latents"), "normalization": "vae"}),
    ):
        config = recipe(f"{name}.yaml", data=source, **options)
        run_here("train_dit.py", "--config", config, "--output_dir", tmp_path / name)
    assert_equal(read_checkpoint(tmp_path / "images", 4), read_checkpoint(tmp_path / "latents", 4))


def test_a_pipeline_of_pixels_from_a_stranger(tmp_path):
    model = make_model(**MODEL, num_layers=1, prediction_type="sample")
    IwinDiTPipeline(model, IdentityAutoencoder(), FlowMatching().scheduler()).save_pretrained(tmp_path)
    assert (tmp_path / "vae" / "iwin_dit.py").read_text().count("IdentityAutoencoder") == 3
    load_pipeline(str(tmp_path))
    for file, changes, message in (
        (
            "transformer/config.json",
            {"patch_bottleneck": 10**9},
            "patch_bottleneck 1000000000, expected a whole",
        ),
        ("transformer/config.json", {"patch_bottleneck": 7}, "the weights do not fit"),
        ("vae/config.json", {"latent_channels": 4}, "makes no model: latent_channels is 4, expected 3"),
        (
            "model_index.json",
            {"vae": ["diffusers", "IdentityAutoencoder"]},
            "or iwin_dit's IdentityAutoencoder",
        ),
    ):
        path = tmp_path / file
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(CheckpointError, match=message):
            load_pipeline(str(tmp_path))
        path.write_text(before)


def parse(*arguments, name="pixels_quickstart"):
    return parse_arguments([*map(str, arguments)], ROOT / "configs" / f"{name}.yaml")[0]


def test_what_does_not_go_with_pixels_is_refused():
    for arguments, message in (
        (("--data.path", "data/digits"), "set data.path data/digits/train, or data.prepare null"),
        (("--data.vae", "null"), "set data.vae, as sd-vae-ft-ema, or none for the pixels themselves"),
        (("--model.sample_frames", 8), "data.prepare digits makes images; remove model.sample_frames"),
        (("--model.patch_bottleneck", 0), "model.patch_bottleneck is 0, expected a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(*arguments)


def test_digits_in_pixels_need_no_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "train_vae", lambda *a: pytest.fail("an autoencoder was trained"))
    dataset = build_data.build_dataset(parse("--data.path", tmp_path / "digits" / "train"))
    assert (len(dataset), dataset.latent_shape) == (digits.NUM_TRAIN, (3, 32, 32))
    assert sorted(path.name for path in (tmp_path / "digits").iterdir() if path.is_dir()) == ["test", "train"]


@pytest.mark.parametrize("name", ["pixels_quickstart", "iwin_b_16_pixels"])
def test_a_tiny_copy_of_each_recipe_trains(name, folders, run_here, tmp_path):
    config = parse(name=name)
    sizes = {"size": "null", "depth": 2, "width": 32, "heads": 2, "patch_size": 4, "sample_size": SIDE}
    sizes |= {"num_classes": 3, "patch_bottleneck": 6, "mixer.window_size": 4}
    options = {f"model.{key}": value for key, value in sizes.items()} | {
        **{"data.path": folders[2], "data.prepare": "null", "output_dir": tmp_path / "run"},
        **{"train.max_steps": 2, "train.batch_images": 4, "train.num_workers": 0, "train.precision": "fp32"},
        **{"optimizer.warmup_steps": 1, "sample.num_inference_steps": 2, "sample.num_per_class": 1},
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    run_here("train_dit.py", "--config", ROOT / "configs" / f"{name}.yaml", *arguments)
    pipeline = load_pipeline(str(tmp_path / "run" / "pipeline"))
    assert pipeline.transformer.config.prediction_type == "sample"
    assert pipeline.transformer.config.qk_norm == config.model.qk_norm
    assert pipeline.scheduler.config.shift == config.objective.shift
