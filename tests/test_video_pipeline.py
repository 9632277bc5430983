"""Clips through autoencoders and the pipeline."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, give_zeros_noise, make_vae
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)

from iwin_dit import IwinDiTTransformer3DModel, IwinDiTVideoPipeline
from iwin_dit.build.loading import load_pipeline
from iwin_dit.data import codec
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.pipelines.base import export_pipeline
from iwin_dit.pipelines.sampling import draw_animation, draw_grid, sample_classes
from iwin_dit.runtime.errors import CheckpointError, ConfigError

WIDTHS = (8, 8, 8, 8)
VIDEO_VAES = {
    "CogVideoX": lambda: AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=WIDTHS,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ),
    "Wan": lambda: AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "LTX": lambda: AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        scaling_factor=0.5,
    ),
    "HunyuanVideo": lambda: AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4
    ),
}


def make_pipeline(vae=None, channels=4, **options):
    torch.manual_seed(0)
    model = IwinDiTTransformer3DModel(
        sample_frames=3,
        sample_size=8,
        in_channels=channels,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=NUM_CLASSES,
        prediction_type="flow_prediction",
    )
    pipeline = IwinDiTVideoPipeline(
        give_zeros_noise(model).eval(), vae or make_vae(), FlowMatching().scheduler(), **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clips_of(pipeline, labels, seeds=None, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or labels]
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0} | options
    return pipeline(labels, generator=generators, **options).frames


@pytest.mark.parametrize("name", VIDEO_VAES)
def test_autoencoders_of_videos(name, tmp_path):
    """There are as many latent frames as said, an image is one frame, and decoding gives the frames back."""
    torch.manual_seed(0)
    VIDEO_VAES[name]().save_pretrained(tmp_path)
    vae = codec.load_vae(str(tmp_path))
    assert codec.is_of_videos(vae)
    assert codec.temporal_factor(vae) == 4
    factor, channels = codec.spatial_factor(vae), codec.latent_channels(vae)
    for frames in (1, 9):
        clip = torch.rand(2, 3, frames, 32, 32) * 2 - 1
        latents, std = codec.encode_posterior(vae, clip)
        assert (
            latents.shape == std.shape == (2, channels, codec.latent_frames(vae, frames), *[32 // factor] * 2)
        )
        assert codec.decode(vae, latents).shape == clip.shape
        assert codec.pixel_frames(vae, latents.shape[2]) == frames
    torch.testing.assert_close(codec.encode(vae, clip[:, :, 0]), codec.encode(vae, clip[:, :, :1]))
    with pytest.raises(ConfigError, match=f"AutoencoderKL{name}.* has no clips of 8 frames; nearest"):
        codec.latent_frames(vae, 8)
    mean, std = codec.vae_statistics(vae)
    assert len(mean) == len(std) == channels
    if name == "LTX":  # among the weights, and divided by the factor
        assert std == pytest.approx([1 / 0.5] * channels)
    pipeline = IwinDiTVideoPipeline.from_pipe(make_pipeline(vae, channels))
    assert pipeline.vae is vae
    assert clips_of(pipeline, [1], num_inference_steps=1).shape == (1, 9, 3, 8 * factor, 8 * factor)
    assert clips_of(pipeline, [1], num_frames=1, num_inference_steps=1).shape[1] == 1


def test_what_cogvideox_cannot_decode_is_refused():
    """Of two latent frames it makes eight, not five."""
    vae = VIDEO_VAES["CogVideoX"]()
    assert codec.decode(vae, torch.randn(1, 4, 2, 4, 4)).shape[2] == 8
    with pytest.raises(ConfigError, match="no clips of 5 frames; nearest: 1 and 9"):
        codec.latent_frames(vae, 5)


def test_autoencoders_of_images_go_frame_by_frame(monkeypatch):
    monkeypatch.setattr(codec, "FRAMES_AT_ONCE", 4)
    vae = make_vae()
    clips = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    latents = codec.encode(vae, clips)
    assert codec.latent_frames(vae, 5) == 5
    for t in range(5):
        torch.testing.assert_close(latents[:, :, t], codec.encode(vae, clips[:, :, t]))
        torch.testing.assert_close(codec.decode(vae, latents)[:, :, t], codec.decode(vae, latents[:, :, t]))


def test_a_clip_depends_on_its_own_seed_alone():
    pipeline = make_pipeline()
    together = clips_of(pipeline, [0, 1, 2], [5, 6, 7])
    for i, label in enumerate([0, 1, 2]):
        torch.testing.assert_close(clips_of(pipeline, [label], [5 + i])[0], together[i], atol=1e-4, rtol=0)
    assert not torch.allclose(clips_of(pipeline, [0], [6])[0], together[0], atol=1e-2)


def test_output_types_and_sizes():
    pipeline = make_pipeline()
    pt = clips_of(pipeline, [1, 2])
    assert pt.shape == (2, 3, 3, 16, 16)
    array = clips_of(pipeline, [1, 2], output_type="np")
    np.testing.assert_allclose(array, pt.movedim(2, -1).numpy())
    clips = clips_of(pipeline, [1, 2], output_type="pil")
    assert [len(frames) for frames in clips] == [3, 3]
    np.testing.assert_array_equal(np.asarray(clips[1][2]), (array[1, 2] * 255).round().astype(np.uint8))
    latents = clips_of(pipeline, [1], output_type="latent")
    assert latents.shape == (1, 4, 3, 8, 8)
    decoded = (codec.decode(pipeline.vae, latents / 0.18215) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(clips_of(pipeline, [1])[0], decoded[0].transpose(0, 1))
    assert clips_of(pipeline, [1], num_frames=5, height=24, width=40).shape == (1, 5, 3, 24, 40)
    with pytest.raises(ValueError, match="expected 1 x 4 x frames x height x width"):
        pipeline([1], latents=torch.randn(1, 4, 8, 8))


def test_film_strips_and_animations():
    pipeline = make_pipeline()
    samples = list(sample_classes(pipeline, [2, 0], 2, seed=0, batch_size=3, num_inference_steps=1))
    assert [(s.label, s.number, len(s.frames)) for s in samples] == [
        (label, number, 3) for label in (2, 0) for number in (0, 1)
    ]
    strips = draw_grid(samples, {})
    assert strips.height == 4 * 66, "a row for each clip"
    first = np.asarray(strips.crop((strips.width - 3 * 66, 0, strips.width - 2 * 66 - 2, 64)))
    np.testing.assert_array_equal(first, np.asarray(samples[0].frames[0].resize((64, 64), 0)))
    assert [frame.size for frame in draw_animation(samples, {})] == [(strips.width - 66, 2 * 66)] * 3
    long = [sample._replace(frames=sample.frames * 8) for sample in samples]
    assert draw_grid(long, {}).width == strips.width + 7 * 66, "ten frames at the most"


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
options = dict(generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type="pt")
torch.save(pipeline(["dog"], **options).frames, sys.argv[2])
"""


def test_an_export_is_loaded_by_us_and_by_diffusers(tmp_path):
    pipeline = make_pipeline(
        id2label={0: "shark", 1: "dog", 2: "umbrella"}, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    folder = tmp_path / "pipeline"
    export_pipeline(pipeline, folder, {"step": 1})
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "IwinDiTVideoPipeline"]
    assert index["transformer"] == ["iwin_dit", "IwinDiTTransformer3DModel"]

    def draw(pipeline):
        generator = torch.Generator().manual_seed(3)
        return pipeline("dog", generator=generator, num_inference_steps=2, output_type="pt").frames

    expected = draw(pipeline)
    ours = load_pipeline(str(folder))
    assert type(ours) is IwinDiTVideoPipeline
    torch.testing.assert_close(draw(IwinDiTVideoPipeline.from_pipe(ours)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(ours), expected, atol=1e-5, rtol=0)
    subprocess.run([sys.executable, "-c", LOAD, str(folder), str(tmp_path / "frames.pt")], check=True)
    loaded = torch.load(tmp_path / "frames.pt", weights_only=True)
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)

    index["transformer"][1] = "IwinDiTTransformer2DModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected iwin_dit's IwinDiTTransformer3DModel"):
        load_pipeline(str(folder))


def test_sample_says_what_it_wrote(run_here, tmp_path):
    export_pipeline(make_pipeline(), tmp_path / "pipeline", {"step": 1})
    command = ("sample.py", "--checkpoint", tmp_path / "pipeline", "--class", 1, "--num-images", 2)
    command = (*command, "--steps", 1, "--out", tmp_path / "b.gif")
    assert f"2 clips in {tmp_path / 'b.png'}\n" in run_here(*command, "--num-frames", 1)
    assert sorted(path.name for path in tmp_path.glob("b.*")) == ["b.json", "b.png"]
    pictures = ", ".join(str(tmp_path / f"b.{kind}") for kind in ("png", "gif", "mp4"))
    assert f"2 clips in {pictures}\n" in run_here(*command)
    assert sorted(path.name for path in tmp_path.glob("b.*")) == ["b.gif", "b.json", "b.mp4", "b.png"]
