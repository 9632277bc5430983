"""Autoencoders as they are used here: factors, statistics, fingerprints, presets."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_vae
from diffusers import AutoencoderDC, AutoencoderKL

from iwin_dit.data import codec
from iwin_dit.runtime.errors import ConfigError, DataError

DC = dict(
    in_channels=3,
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=("ResBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3,
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), ()),
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    scaling_factor=0.5,
)


def kl(levels):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[4] * levels,
        norm_num_groups=2,
        latent_channels=3,
        mid_block_add_attention=False,
    ).eval()


@pytest.mark.parametrize("make", [lambda: kl(1), lambda: kl(3), lambda: AutoencoderDC(**DC).eval()])
def test_factors_are_those_of_what_is_encoded(make):
    vae, pixels = make(), torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = codec.encode_posterior(vae, pixels)
    factor = codec.spatial_factor(vae)
    assert mean.shape == std.shape == (2, codec.latent_channels(vae), 16 // factor, 24 // factor)
    assert codec.decode(vae, mean).shape == pixels.shape
    assert torch.equal(codec.encode(vae, pixels), mean)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    if isinstance(vae, AutoencoderDC):
        assert torch.equal(mean, encoded.latent)
        assert not std.any(), "it has no posterior"
    else:
        posterior = encoded.latent_dist
        torch.testing.assert_close((mean, std), (posterior.mean, posterior.logvar.mul(0.5).exp()))
    assert not codec.is_of_videos(vae)
    for frames in (1, 2, 7):
        assert codec.latent_frames(vae, frames) == codec.pixel_frames(vae, frames) == frames
    for frames in (0, -2):
        with pytest.raises(ConfigError, match=f"has no clips of {frames} frames"):
            codec.latent_frames(vae, frames)


def test_a_factor_that_is_not_said_is_that_of_the_levels():
    config = SimpleNamespace(block_out_channels=[1, 2, 3, 4])
    assert codec.spatial_factor(SimpleNamespace(config=config)) == 8


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (9, 3), (17, 5)])
def test_frames_of_latent_frames(frames, latent):
    """The first frame alone, then four to a latent frame: as Wan and its like say in their config."""
    wan = type("AutoencoderKLWan", (), {"config": {"scale_factor_temporal": 4}})()
    hunyuan = type("AutoencoderKLHunyuanVideo", (), {"config": {"temporal_compression_ratio": 4}})()
    other = type("AutoencoderKLWan", (), {"config": {}, "temporal_compression_ratio": 4.0})()
    for vae in (wan, hunyuan, other):
        assert codec.is_of_videos(vae)
        assert codec.latent_frames(vae, frames) == latent
        assert codec.pixel_frames(vae, latent) == frames
        with pytest.raises(
            ConfigError, match=f"no clips of {frames + 2} frames; nearest: {frames} and {frames + 4}"
        ):
            codec.latent_frames(vae, frames + 2)


def test_statistics_are_diffusers_shift_and_scaling():
    """Its pipelines feed ``(latents - shift_factor) * scaling_factor``."""
    vae, latents = make_vae(), torch.randn(2, 4, 3, 3)
    vae.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    found = codec.normalize(latents, *codec.vae_statistics(vae))
    torch.testing.assert_close(found, (latents - 0.1159) * 0.3611)
    vae.register_to_config(shift_factor=None, scaling_factor=None)
    torch.testing.assert_close(codec.normalize(latents, *codec.vae_statistics(vae)), latents)
    vae.register_to_config(latents_mean=[1.0, 2, 3, 4], latents_std=None)
    assert codec.vae_statistics(vae) == ([0.0] * 4, [1.0] * 4), "both, or neither"


def test_latents_are_float32_whatever_the_autoencoder_is():
    vae, pixels = make_vae(), torch.rand(1, 3, 16, 16) * 2 - 1
    exact = codec.encode(vae, pixels)
    half = codec.encode_posterior(vae.bfloat16(), pixels)
    assert {tensor.dtype for tensor in half} == {torch.float32}
    torch.testing.assert_close(half[0], exact, atol=0.05, rtol=0.05)
    assert codec.decode(vae, exact).dtype == torch.bfloat16


def test_an_autoencoder_of_images_decodes_clips_frame_by_frame():
    vae, latents = make_vae(), torch.randn(2, 4, 3, 4, 4)
    clips = codec.decode(vae, latents)
    frames = [codec.decode(vae, latents[:, :, i]) for i in range(3)]
    torch.testing.assert_close(clips, torch.stack(frames, 2))


def test_fingerprints_are_of_names_and_weights():
    one, same, other = make_vae(), make_vae(), make_vae()
    assert codec.weights_sha256(one) == codec.weights_sha256(same.double()), "whatever their precision"
    with torch.no_grad():
        other.post_quant_conv.bias[0] += 1e-6
    assert codec.weights_sha256(one) != codec.weights_sha256(other)
    linear = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    renamed = torch.nn.ModuleDict({"b": linear["a"]})
    assert codec.weights_sha256(linear) != codec.weights_sha256(renamed)


def test_an_autoencoder_is_loaded_frozen_and_to_be_used(tmp_path):
    make_vae().train().save_pretrained(tmp_path / "vae")
    vae = codec.load_vae(str(tmp_path / "vae"))
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(DataError, match="vae holds a VQModel, expected one of AutoencoderKL, AutoencoderDC"):
        codec.load_vae(str(tmp_path / "vae"))


@pytest.mark.parametrize("name", ["sd3-vae", "sdxl-vae"])
def test_a_preset_is_loaded_from_its_folder_of_the_repository(monkeypatch, name):
    asked = []

    def load_config(source, **where):
        asked.append((source, where))
        return {"_class_name": "AutoencoderKL"}

    def from_pretrained(source, use_safetensors, **where):
        assert use_safetensors
        asked.append((source, where))
        return make_vae()

    monkeypatch.setattr(codec.AutoencoderKL, "load_config", load_config)
    monkeypatch.setattr(codec.AutoencoderKL, "from_pretrained", from_pretrained)
    codec.load_vae(name)
    where = {"subfolder": "vae"} if name == "sd3-vae" else {}
    assert asked == [(codec.PRESETS[name].source, where)] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("sd-vae-ft-em", "did you mean sd-vae-ft-ema?"), ("zzzz", "user/model; presets: sd-vae-ft-ema, ")],
)
def test_a_name_that_is_none_is_refused(name, message):
    with pytest.raises(DataError) as caught:
        codec.load_vae(name)
    assert message in str(caught.value)
