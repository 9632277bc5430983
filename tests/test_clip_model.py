"""The transformer of clips: with one frame it is that of images, and what is said of three axes holds."""

import re

import pytest
import torch

from iwin_dit import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.models.official_names import inflate

LABELS, TIMES = torch.tensor([0, 3]), torch.tensor([100.0, 700.0])
SIZES = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, num_classes=3)


def filled(model):
    """Weights that all have something to say, also those that begin as zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(**options):
    return filled(IwinDiTTransformer2DModel(sample_size=8, **(SIZES | options)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixer": {"window_size": 4}},
        {"mixer": {"window_size": [4, 3], "kernel_size": 5}, "patch_size": 2},  # padded
        {"mixer": {"window_size": 8}},  # without a convolution
        {"mixer": {"name": "global"}, "position_embedding": "sincos"},
        {"norm": "layer_norm", "mlp": "gelu", "qk_norm": True, "out_channels": 8},
    ],
)
def test_one_frame_is_an_image_bit_for_bit(options):
    flat = images(**options)
    solid = IwinDiTTransformer3DModel.from_2d(flat, sample_frames=8)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected, found = flat(x, TIMES, LABELS).sample, solid(x[:, :, None], TIMES, LABELS).sample
    assert torch.equal(found[:, :, 0], expected)
    assert solid.latent_size == (8, 8, 8)
    timed = IwinDiTTransformer3DModel.from_2d(flat, sample_frames=8, position_embedding="time")
    assert options.get("position_embedding") or torch.equal(timed(x[:, :, None], TIMES, LABELS).sample, found)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(found[:, :, 0], x, cotangent)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, x, cotangent)[0], rtol=1e-4, atol=1e-5)


def test_a_still_clip_is_its_image_where_nothing_else_tells_frames_apart():
    """Windows over all frames see one key several times; per-frame kernels see their frame."""
    flat = images(mixer={"window_size": 4})
    still = {"window_size": ["all", 4, 4], "kernel_size": [1, 3, 3]}
    solid = IwinDiTTransformer3DModel.from_2d(flat, sample_frames=5, mixer=still)
    x = torch.randn(2, 4, 8, 8)
    clip = x[:, :, None].expand(-1, -1, 5, -1, -1)
    expected = flat(x, TIMES, LABELS).sample
    for frame in solid(clip, TIMES, LABELS).sample.unbind(2):
        torch.testing.assert_close(frame, expected, rtol=1e-4, atol=1e-4)


def test_any_number_of_frames_is_valid_and_frames_are_joined():
    model = filled(IwinDiTTransformer3DModel(sample_frames=4, sample_size=8, **SIZES))
    for frames in (1, 3, 4, 7):
        clip = torch.randn(2, 4, frames, 6, 8)
        found = model(clip, TIMES, LABELS).sample
        assert found.shape == clip.shape
        changed = clip.clone()
        changed[:, :, -1] += 1
        moved = (model(changed, TIMES, LABELS).sample - found).abs().amax((0, 1, 3, 4))
        assert (moved > 0).all(), "the last frame is seen by all"


@pytest.mark.parametrize("positions", ["time", "sincos"])
def test_positions_of_frames_tell_them_apart(positions):
    model = filled(
        IwinDiTTransformer3DModel(
            sample_frames=4, sample_size=4, mixer={"name": "global"}, position_embedding=positions, **SIZES
        )
    )
    clip = torch.randn(1, 4, 1, 4, 4).expand(-1, -1, 4, -1, -1)
    frames = model(clip, TIMES[:1], LABELS[:1]).sample.unbind(2)
    assert not any(torch.allclose(frames[0], other, atol=1e-3) for other in frames[1:])


def test_the_model_of_clips_makes_the_round_trip(tmp_path):
    model = filled(IwinDiTTransformer3DModel(sample_frames=4, sample_size=8, **SIZES))
    model.save_pretrained(tmp_path)
    loaded = IwinDiTTransformer3DModel.from_pretrained(tmp_path)
    clip = torch.randn(2, 4, 4, 8, 8)
    assert loaded.config.sample_frames == 4
    assert torch.equal(loaded(clip, TIMES, LABELS).sample, model(clip, TIMES, LABELS).sample)


def test_what_does_not_fit_is_named():
    for kind, options, message in (
        (IwinDiTTransformer3DModel, {}, "IwinDiTTransformer3DModel needs a number of frames"),
        (IwinDiTTransformer2DModel, {"sample_frames": 4}, "IwinDiTTransformer2DModel has none"),
        (
            IwinDiTTransformer3DModel,
            {"sample_frames": 4, "position_embedding": "rope"},
            "expected one of none, time, sincos",
        ),
        (
            IwinDiTTransformer3DModel,
            {"sample_frames": 4, "mixer": {"window_size": [4, 4]}},
            "window_size [4, 4] has 2 axes, the grid (4, 8, 8) has 3",
        ),
        (
            IwinDiTTransformer3DModel,
            {"sample_frames": 4, "mixer": {"kernel_size": [3, 3]}},
            "kernel_size [3, 3] has 2 axes",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            kind(sample_size=8, **SIZES, **options)
    model = IwinDiTTransformer3DModel(sample_frames=4, sample_size=8, **SIZES)
    with pytest.raises(ValueError, match="this model takes frames, height and width"):
        model(torch.randn(1, 4, 8, 8), TIMES[:1], LABELS[:1])


def test_kernels_get_an_axis_of_time():
    kernel, patch = torch.randn(6, 1, 3, 3), torch.randn(6, 3, 4, 4)
    weights = {
        "mixer.convolution.conv.weight": kernel,
        "patch_embed.proj.weight": patch,
        "norm": torch.ones(6),
    }
    like = {
        "mixer.convolution.conv.weight": torch.empty(6, 1, 5, 3, 3),
        "patch_embed.proj.weight": torch.empty(6, 3, 2, 4, 4),
        "norm": torch.empty(6),
        "pos_embed": torch.empty(1, 4, 1, 1, 6),
    }
    found = inflate(weights, like)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in like.items()}
    clip = torch.randn(1, 6, 5, 7, 7)
    convolved = torch.nn.functional.conv3d(
        clip, found["mixer.convolution.conv.weight"], padding=(2, 1, 1), groups=6
    )
    for t in range(5):
        by_frame = torch.nn.functional.conv2d(clip[:, :, t], kernel, padding=1, groups=6)
        torch.testing.assert_close(convolved[:, :, t], by_frame)
    still = torch.randn(1, 3, 1, 8, 8).expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(
        torch.nn.functional.conv3d(still, found["patch_embed.proj.weight"], stride=(2, 4, 4))[:, :, 0],
        torch.nn.functional.conv2d(still[:, :, 0], patch, stride=4),
    )
    assert not found["pos_embed"].any()
