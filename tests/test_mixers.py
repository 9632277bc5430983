"""The other mixers, against timm's blocks, natten's definition, and slow references."""

import math
import re
from dataclasses import asdict
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from conftest import give_zeros_noise, make_model
from test_layers import HEADS, WIDTH, coordinates, masked_attention, tokens
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn

from iwin_dit.build.budget import multiply_adds
from iwin_dit.layers import kernels
from iwin_dit.layers.block import Block
from iwin_dit.layers.embeddings import rope_angles
from iwin_dit.layers.specs import MIXERS, BlockSpec, MixerSpec
from iwin_dit.layers.token_mixer import make_mixer as make
from iwin_dit.models.transformer import IwinDiTTransformer3DModel


def make_mixer(name, grid, index=0, **options):
    torch.manual_seed(0)
    return make(BlockSpec(WIDTH, HEADS, mixer=MixerSpec(name, **options)), grid, index).double()


def noisy(module, seed=0):
    """Every parameter random, biases and tables too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


# -- Swin and Swin V2 against timm


OF_TIMM = {
    "attention.qkv.": "attn.qkv.",
    "attention.proj.": "attn.proj.",
    "attention.q_bias": "attn.q_bias",
    "attention.v_bias": "attn.v_bias",
    "attention.logit_scale": "attn.logit_scale",
    "relative_bias.bias_network.": "attn.cpb_mlp.",
    "relative_bias.bias_table": "attn.relative_position_bias_table",
}


def copy_mixer(mixer, theirs):
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for ours, prefix in OF_TIMM.items():
            if name.startswith(prefix):
                weights[ours + name.removeprefix(prefix)] = tensor
    name = "relative_bias.bias_table"
    if name in weights:
        weights[name] = weights[name].view(mixer.state_dict()[name].shape)
    mixer.load_state_dict(weights)


def timm_block(name, grid, window, index):
    kind = {"swin": SwinTransformerBlock, "swin_v2": SwinTransformerV2Block}[name]
    shift = [m // 2 if index % 2 else 0 for m in window]
    norm = partial(nn.LayerNorm, eps=1e-6)
    options = dict(num_heads=HEADS, window_size=window, shift_size=shift, norm_layer=norm)
    return noisy(kind(WIDTH, grid, act_layer=partial(nn.GELU, approximate="tanh"), **options).double())


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("grid", "window"), [((8, 8), (4, 4)), ((6, 12), (3, 4)), ((4, 8), (4, 4))])
@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_swin_blocks_are_those_of_timm(name, grid, window, index):
    """The whole block: our modulation takes the place of their norms' weights."""
    theirs = timm_block(name, grid, window, index)
    spec = BlockSpec(
        WIDTH,
        HEADS,
        mixer=MixerSpec(name, window_size=list(window)),
        norm="layer_norm",
        mlp="gelu",
        post_norm=name == "swin_v2",
    )
    block = Block(spec, grid, index).double()
    copy_mixer(block.mixer, theirs)
    names = {"fc1": "up", "fc2": "down"}
    block.mlp.load_state_dict({names[n[:3]] + n[3:]: t for n, t in theirs.mlp.state_dict().items()})
    norms = theirs.norm1, theirs.norm2
    chunks = [c for n in norms for c in (n.bias, n.weight - 1, torch.zeros(WIDTH))]  # shift, scale, open gate
    with torch.no_grad():
        block.modulation.linear.weight.zero_()
        block.modulation.linear.bias.copy_(torch.cat(chunks))
    x = tokens(grid).requires_grad_()
    got = block(x, torch.zeros(2, WIDTH, dtype=torch.float64))  # its norms are computed in float32
    torch.testing.assert_close(got, theirs(x), rtol=1e-5, atol=1e-5)
    got, expected = block.mixer(x), theirs._attn(x)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, x, cotangent), torch.autograd.grad(expected, x, cotangent)
    )


def shifted_windows(grid, window, shift):
    """Token pairs of one window: windows that begin ``shift`` before the grid does, nothing wraps."""
    groups = torch.stack(
        [(c + (m - s if s else 0)) // m for c, m, s in zip(coordinates(grid).T, window, shift, strict=True)]
    )
    return (groups[:, :, None] == groups[:, None, :]).all(0)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("grid", "window"), [((7, 9), (4, 4)), ((8, 10), (4, 3)), ((4, 6, 10), (2, 3, 4)), ((3, 5, 7), (2, 4, 2))]
)
def test_shifted_windows_on_any_grid_see_what_lies_in_them(grid, window, index):
    """Odd sizes, padding and three axes: masked attention by the definition, the bias by a loop."""
    swin = noisy(make_mixer("swin", grid, index, window_size=list(window)))
    shift = [m // 2 if index and m < side else 0 for m, side in zip(window, grid, strict=True)]
    allowed = shifted_windows(grid, window, shift)
    places = coordinates(grid)
    offsets = places[:, None] - places[None] + torch.tensor(window) - 1
    offsets = offsets.clamp(min=0).minimum(2 * torch.tensor(window) - 2)  # hidden pairs are farther apart
    x = tokens(grid).requires_grad_()
    bias = swin.relative_bias.bias_table[offsets.unbind(-1)]  # (N, N, K)

    q, k, v = swin.attention.qkv(x.flatten(1, -2)).unflatten(-1, (3, HEADS, -1)).unbind(2)
    scores = torch.einsum("bnkd,bmkd->bnmk", q, k) / (WIDTH // HEADS) ** 0.5 + bias
    weights = scores.masked_fill(~allowed[None, :, :, None], -torch.inf).softmax(2)
    expected = swin.attention.proj(torch.einsum("bnmk,bmkd->bnkd", weights, v).flatten(2)).view(x.shape)
    got = swin(x)
    torch.testing.assert_close(got, expected)
    inputs = [x, *swin.parameters()]
    cotangent = torch.randn_like(got)
    gradients = torch.autograd.grad(got, inputs, cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, cotangent))


def test_the_windows_of_swin_stay_as_large_on_other_grids():
    swin = make_mixer("swin", (8, 8), window_size="auto")
    assert swin.window == (4, 4)
    for grid in ((16, 16), (3, 9)):
        assert swin(tokens(grid)).shape == (2, *grid, WIDTH)
    x = tokens((3, 3))  # smaller than a window: the middle of the table
    small = make_mixer("swin", (3, 3), window_size=3)
    middle = {"relative_bias.bias_table": swin.relative_bias.bias_table[1:-1, 1:-1]}
    small.load_state_dict(swin.state_dict() | middle)
    torch.testing.assert_close(small(x), swin(x))


# -- neighbourhoods


@pytest.mark.parametrize(
    ("grid", "window"),
    [((7, 9), 3), ((5, 8), [3, 5]), ((3, 4), 5), ((3, 6, 5), 3), ((8, 8), "auto"), ((5, 6), 2)],
)
def test_each_token_sees_as_many_neighbours_moved_inwards_at_the_borders(grid, window):
    mixer = make_mixer("neighborhood", grid, window_size=window)
    sides = mixer.spec.window(grid)
    assert all(m % 2 == 1 and m <= side for m, side in zip(sides, grid, strict=True))
    places = coordinates(grid)
    allowed = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, place in enumerate(places.tolist()):
        for j, other in enumerate(places.tolist()):
            firsts = [min(max(p - m // 2, 0), s - m) for p, m, s in zip(place, sides, grid, strict=True)]
            allowed[i, j] = all(f <= o < f + m for f, o, m in zip(firsts, other, sides, strict=True))
    assert (allowed.sum(1) == torch.tensor(sides).prod()).all()
    x = tokens(grid)
    torch.testing.assert_close(mixer(x), masked_attention(mixer.attention, x, allowed))
    if len(grid) == 2:
        rope = rope_angles(grid, WIDTH // HEADS, x.device)
        expected = masked_attention(mixer.attention, x, allowed, rope.flatten(0, 1))
        torch.testing.assert_close(mixer(x, rope), expected)


@pytest.mark.parametrize(("grid", "window"), [((7, 9), 3), ((6, 8), [3, 5])])
def test_natten_gives_the_same(grid, window):
    """Its forward pass runs on a CPU too; it is an optional extra that not every machine can install."""
    pytest.importorskip("natten")
    mixer = make_mixer("neighborhood", grid, window_size=window).float()
    x = tokens(grid).float()
    for rope in (None, rope_angles(grid, WIDTH // HEADS, x.device)):
        with torch.no_grad():
            got = mixer._by_natten(x, mixer.spec.window(grid), rope)
            torch.testing.assert_close(got, mixer(x, rope), rtol=1e-4, atol=1e-5)


# -- factorised


def test_factorised_attention_is_over_each_frame_then_over_each_place():
    grid = (3, 4, 5)
    mixer = make_mixer("factorised", grid)
    x, places = tokens(grid), coordinates(grid)
    same_frame = places[:, None, 0] == places[None, :, 0]
    same_place = (places[:, None, 1:] == places[None, :, 1:]).all(-1)
    expected = masked_attention(mixer.spatial.attention, x, same_frame)
    expected = masked_attention(mixer.temporal.attention, expected, same_place)
    torch.testing.assert_close(mixer(x), expected)
    with pytest.raises(ValueError, match="the factorised mixer is for clips: set sample_frames"):
        make_mixer("factorised", (4, 4))


def reached(mixer, grid):
    """Which tokens depend on which, by the Jacobian's pattern: ``(N, N)``."""
    x = tokens(grid, batch=1)[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x[None])[0].sum(-1), x, vectorize=True)
    return (jacobian.abs().sum(-1) > 0).view(math.prod(grid), math.prod(grid))


# -- all of them in a network


def options_of(name):
    options = {"mixer": {"name": name} | ({"window_size": 4} if "window_size" in MIXERS[name].fields else {})}
    return options | ({"post_norm": True} if name == "swin_v2" else {})


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "factorised"])
def test_each_serves_images_of_any_size(name):
    model = make_model(**options_of(name))
    labels = torch.tensor([0, 1])
    for size in ((8, 8), (6, 10)):
        model(torch.randn(2, 4, *size), torch.tensor(500.0), labels).sample.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    nothing = model(torch.randn(0, 4, 8, 8), torch.tensor(500.0), labels[:0]).sample
    assert nothing.shape == (0, 4, 8, 8)
    channels, positions = 2 * 8, 8 * 8
    projections = (
        2 * positions * (4 * channels**2 + 3 * channels * int(2 / 3 * 4 * channels))
    )  # of two blocks
    assert projections < multiply_adds(model.to("meta")) < 2 * projections


def make_clip_model(name, **options):
    torch.manual_seed(0)
    defaults = dict(
        sample_size=8,
        sample_frames=4,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=3,
    )
    return give_zeros_noise(IwinDiTTransformer3DModel(**(defaults | options_of(name) | options))).eval()


@pytest.mark.parametrize("name", MIXERS)
def test_each_serves_clips(name):
    model = make_clip_model(name)
    for size in ((4, 8, 8), (3, 6, 10), (1, 8, 8)):
        sample = model(torch.randn(1, 4, *size), torch.tensor(500.0), torch.tensor([1])).sample
        assert sample.shape == (1, 4, *size)
        assert sample.isfinite().all()
    sample.sum().backward()


def answer(model):
    size = (4, 8, 8) if model.rank == 3 else (8, 8)
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.tensor(500.0), torch.tensor([0, 1])).sample


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *((n, r) for n in MIXERS for r in (2, 3) if (n, r) != ("factorised", 2)),
        ("iwin by kernels", 2),
        pytest.param("iwin by kernels", 3, marks=pytest.mark.slow),  # Triton's interpreter takes a minute
    ],
)
def test_offloaded_weights_are_found(name, rank):
    """Hooks bring weights when a module is called; without, they are on the device ``meta``."""
    if name == "iwin by kernels":
        name = "iwin"
        kernels.select("triton")
    try:
        make = make_clip_model if rank == 3 else lambda name: make_model(**options_of(name))
        expected = answer(make(name))
        offloaded = cpu_offload(make(name), torch.device("cpu"))
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(answer(offloaded), expected)
        stored = make(name)
        stored.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert any(parameter.dtype == torch.bfloat16 for parameter in stored.parameters())
        torch.testing.assert_close(answer(stored), expected, rtol=0.2, atol=0.05)
    finally:
        kernels.select("auto")


@pytest.mark.parametrize(
    ("name", "rank"), [(n, r) for n in MIXERS for r in (2, 3) if (n, r) != ("factorised", 2)]
)
def test_automatic_windows_leave_no_token_alone_on_short_axes(name, rank):
    for side in (2, 3, 4, 5, 6):
        grid = (side,) * 2 if rank == 2 else (side, 4, 2)
        seen = [reached(make_mixer(name, grid, index), grid).double() for index in range(2)]
        both = (seen[1] @ seen[0]).view(*grid, *grid)
        for axis in range(rank):
            along = both.movedim((axis, rank + axis), (0, 1))[0, 1:].flatten(1)
            assert along.any(), f"grid {grid}: tokens that differ along axis {axis} never meet"


@pytest.mark.parametrize(
    "options",
    [
        *(options_of(name) for name in MIXERS if name != "factorised"),
        {"mixer": {"name": "swin", "window_size": [4, 2]}},
        {"mixer": {"name": "neighborhood", "window_size": [3, 5]}},
    ],
    ids=str,
)
def test_inflated_to_clips_each_does_to_one_frame_what_it_does_to_an_image(options):
    images = make_model(**options)
    clips = IwinDiTTransformer3DModel.from_2d(images, sample_frames=4)
    x, time, label = torch.randn(2, 4, 6, 10), torch.tensor(500.0), torch.tensor([0, 1])
    expected = images(x, time, label).sample
    torch.testing.assert_close(clips(x[:, :, None], time, label).sample[:, :, 0], expected)


def test_fields_that_a_mixer_does_not_read_are_refused():
    for name, options in (
        ("global", dict(window_size=4)),
        ("swin", dict(kernel_size=5)),
        ("neighborhood", dict(convolution=False)),
    ):
        with pytest.raises(ValueError, match=f"the {name} mixer has no {next(iter(options))}"):
            MixerSpec(name, **options)
    with pytest.raises(
        ValueError, match=re.escape("mixer.name is 'mamba', expected one of iwin, global, swin")
    ):
        MixerSpec("mamba")
    with pytest.raises(ValueError, match="swin_v2 normalises queries and keys already"):
        BlockSpec(WIDTH, HEADS, mixer=MixerSpec("swin_v2"), qk_norm=True)


def test_a_key_of_version_0_1_is_read_where_it_says_what_is_done_now():
    assert MixerSpec(convolution_on="input") == MixerSpec()
    assert "convolution_on" not in asdict(MixerSpec())
    make_model(mixer={"window_size": 4, "convolution_on": "input"})
    with pytest.raises(ValueError, match="convolution_on is 'values', which version"):
        MixerSpec(convolution_on="values")


# -- Triton's kernels in the network


def test_a_model_with_kernels_is_the_model_without():
    """In Triton's interpreter on a CPU; (6, 10) is padded."""
    model = make_model(mixer={"window_size": 4})
    x, labels = torch.randn(1, 4, 6, 10), torch.tensor([1])
    results = []
    for name in ("torch", "triton"):
        kernels.select(name)
        try:
            model.zero_grad()
            sample = model(x, torch.tensor(500.0), labels).sample
            sample.square().sum().backward()
        finally:
            kernels.select("auto")
        results.append((sample, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[1][0], results[0][0]), "the kernels were not used"
