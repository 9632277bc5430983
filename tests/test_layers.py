"""Layers against slow references that are written from the definitions."""

import re

import einops
import pytest
import torch
import torch.nn.functional as F

from iwin_dit.layers import windows
from iwin_dit.layers.block import Block
from iwin_dit.layers.embeddings import apply_rope, rope_angles, sincos_positions
from iwin_dit.layers.global_attention import GlobalMixer
from iwin_dit.layers.iwin import IwinMixer
from iwin_dit.layers.specs import MIXERS, BlockSpec, MixerSpec

WIDTH, HEADS = 16, 2


def mixer(grid, cls=IwinMixer, **options):
    torch.manual_seed(0)
    name = "global" if cls is GlobalMixer else "iwin"
    return cls(BlockSpec(WIDTH, HEADS, mixer=MixerSpec(name, **options)), grid).double()


def tokens(grid, batch=2):
    return torch.randn(batch, *grid, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def coordinates(grid):
    return torch.cartesian_prod(*[torch.arange(side) for side in grid]).reshape(-1, len(grid))


def same_window(grid, window):
    """Section 3: tokens attend to each other where coordinates agree modulo G = side / M on every axis."""
    padded = [-(-side // m) * m for side, m in zip(grid, window, strict=True)]
    groups = torch.tensor([side // m for side, m in zip(padded, window, strict=True)])
    group = coordinates(grid) % groups
    return (group[:, None] == group[None]).all(-1)


def masked_attention(attention, x, allowed, rope=None):
    """All N^2 scores, those outside the window at minus infinity, one head after the other."""
    batch, *grid, width = x.shape
    q, k, v = attention.qkv(x.reshape(batch, -1, width)).chunk(3, dim=-1)
    heads, d = [], width // attention.heads
    for head in range(attention.heads):
        mine = slice(head * d, (head + 1) * d)
        q_h, k_h = q[..., mine], k[..., mine]
        if rope is not None:
            q_h, k_h = apply_rope(rope, q_h, k_h)
        scores = (q_h @ k_h.mT / d**0.5).masked_fill(~allowed, -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., mine])
    return attention.proj(torch.cat(heads, -1)).reshape(batch, *grid, width)


def shifted_convolution(convolution, x):
    """The depthwise convolution as a sum of shifted products, zeros outside."""
    weight, bias = convolution.conv.weight, convolution.conv.bias
    kernel, grid = weight.shape[2:], x.shape[1:-1]
    padded = F.pad(x, (0, 0, *(side // 2 for side in reversed(kernel) for _ in range(2))))
    total = bias.expand_as(x)
    for place in coordinates(kernel).tolist():
        shifted = padded[(slice(None), *(slice(i, i + side) for i, side in zip(place, grid, strict=True)))]
        total = total + weight[(slice(None), 0, *place)] * shifted
    return total


GRIDS = [
    ((8, 8), 4),
    ((8, 12), [4, 3]),
    ((6, 10), 2),
    ((7, 9), 4),
    ((5, 8), [2, 3]),
    ((9, 9), "auto"),
    ((3, 3), 8),
    ((4, 6, 10), [2, 3, 5]),
    ((4, 6, 10), "auto"),
    ((4, 6, 10), ["all", 3, "auto"]),
    ((4, 6, 10), 3),
    ((3, 5, 7), [2, 4, 4]),
    ((5, 4, 9), ["all", 2, 4]),
    ((1, 6, 10), [2, 3, 5]),
]


@pytest.mark.parametrize("kernel", [3, [1, 3, 3], [3, 1, 5]], ids=["3", "133", "315"])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_iwin_is_attention_masked_by_the_definition_plus_a_convolution(grid, window, kernel):
    kernel = kernel[-len(grid) :] if isinstance(kernel, list) else kernel
    iwin = mixer(grid, window_size=window, kernel_size=kernel)
    x = tokens(grid).requires_grad_()
    expected = masked_attention(iwin.attention, x, same_window(grid, iwin.spec.window(grid)))
    if iwin.convolution is not None:
        expected = expected + shifted_convolution(iwin.convolution, x)
    got = iwin(x)
    torch.testing.assert_close(got, expected)

    cotangent = torch.randn_like(got)
    inputs = [x, *iwin.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_padding_takes_part_where_it_is_not_masked():
    """mask_padding=False: attention on the grid that is padded with zeros at the bottom and right."""
    iwin = mixer((7, 9), window_size=4, mask_padding=False)
    x = tokens((7, 9))
    padded = F.pad(x, (0, 0, 0, 3, 0, 1))
    expected = masked_attention(iwin.attention, padded, same_window((8, 12), (4, 4)))[:, :7, :9]
    torch.testing.assert_close(iwin.attention(x), expected)
    masked = mixer((7, 9), window_size=4).attention(x)
    assert not torch.allclose(masked, expected)


def test_global_mixer_is_attention_without_a_mask():
    dense = mixer((3, 5), GlobalMixer)
    x = tokens((3, 5))
    torch.testing.assert_close(
        dense(x), masked_attention(dense.attention, x, torch.ones(15, 15, dtype=torch.bool))
    )


@pytest.mark.parametrize(("grid", "window"), [((4, 6), [2, 3]), ((5, 6), 4)])
def test_rope_follows_the_tokens_into_their_windows(grid, window):
    iwin = mixer(grid, window_size=window)
    x = tokens(grid)
    rope = rope_angles(grid, WIDTH // HEADS, x.device)
    expected = masked_attention(
        iwin.attention, x, same_window(grid, iwin.spec.window(grid)), rope.flatten(0, 1)
    )
    torch.testing.assert_close(iwin.attention(x, rope), expected)


def test_rope_scores_depend_on_differences_of_positions_only():
    angles = rope_angles((6, 6), 8, torch.device("cpu"))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(a, b):
        return apply_rope(angles[a][None], q[None])[0][0] @ apply_rope(angles[b][None], k[None])[0][0]

    torch.testing.assert_close(score((0, 1), (2, 4)), score((3, 2), (5, 5)))
    assert not torch.isclose(score((0, 1), (2, 4)), score((0, 1), (3, 4)))


def test_sincos_positions_are_those_of_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(32, (4, 4), output_type="pt", base_size=4).reshape(4, 4, 32)
    torch.testing.assert_close(sincos_positions((4, 4), 32, torch.device("cpu")), theirs.float())


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("grid", "window"), [((8, 12), (4, 3)), ((4, 6, 10), (2, 3, 5))])
def test_windows_hold_the_tokens_of_the_definition(grid, window, interleaved):
    """Two patterns for every rank; a window is a set of coordinates that the definition names."""
    x = coordinates(grid).reshape(1, *grid, -1)
    parts = windows.partition(x, window, interleaved)
    groups = torch.tensor(grid) // torch.tensor(window)
    group = parts % groups if interleaved else parts // torch.tensor(window)
    assert (group == group[:, :1]).all(), "all tokens of a window share their group"
    assert len({tuple(g.tolist()) for g in group[:, 0]}) == groups.prod()
    assert torch.equal(windows.reverse(parts, window, grid, interleaved), x)


def test_the_two_patterns_of_rank_two_are_those_of_the_paper():
    x = torch.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    sizes = dict(mh=4, mw=3)
    assert torch.equal(
        windows.partition(x, (4, 3)),
        einops.rearrange(x, "b (mh gh) (mw gw) c -> (b gh gw) (mh mw) c", **sizes),
    )
    assert torch.equal(
        windows.partition(x, (4, 3), interleaved=False),
        einops.rearrange(x, "b (gh mh) (gw mw) c -> (b gh gw) (mh mw) c", **sizes),
    )


@pytest.mark.parametrize("side", [8, 16, 32, 64, 7, 9, 20, 21])
def test_auto_window_is_the_smallest_divisor_that_connects(side):
    (window,) = MixerSpec().window((side,))
    assert side % window == 0
    assert 3 * window >= side
    assert not any(side % m == 0 and 3 * m >= side for m in range(1, window))


def connected(grid, window, depth, kernel_size=3):
    """Share of token pairs whose first reaches the second in ``depth`` blocks, by the Jacobian's pattern."""
    stack = [mixer(grid, window_size=window, kernel_size=kernel_size) for _ in range(depth)]

    def run(x):
        for layer in stack:
            x = x + layer(x[None])[0]
        return x.sum(-1)

    x = tokens(grid)[0]
    jacobian = torch.autograd.functional.jacobian(run, x, vectorize=True).abs().sum(-1)
    return (jacobian > 0).double().mean().item()


def test_one_block_sees_its_window_and_its_neighbourhood():
    assert connected((16, 16), 8, depth=1) == pytest.approx(0.28, abs=0.01)


def test_two_blocks_connect_everything_when_groups_are_few():
    assert connected((12, 12), 6, depth=2) == 1  # G = 2 <= (K + 1) / 2


def test_automatic_windows_connect_clips_in_two_blocks():
    assert MixerSpec().window((4, 6, 8)) == (2, 2, 4)  # G is 2, 3 and 2
    assert 0.9 < connected((4, 6, 4), "auto", depth=2) < 1
    assert connected((4, 6, 4), "auto", depth=3) == 1
    assert MixerSpec(kernel_size=[1, 3, 3]).window((8, 16, 16)) == (
        8,
        8,
        8,
    )  # no other way from frame to frame


def test_three_groups_take_three_blocks():
    assert 0.96 < connected((12, 12), 4, depth=2) < 1  # G = K: all but pairs near opposite borders
    assert connected((12, 12), 4, depth=3) == 1


def test_the_convolution_is_left_out_where_a_window_covers_the_grid():
    assert mixer((8, 8), window_size=8).convolution is None
    assert mixer((8, 8), window_size=16).num_branches == 1
    assert mixer((8, 9), window_size=8).num_branches == 2
    assert mixer((8, 8), window_size=8, convolution=True).num_branches == 2
    assert mixer((16, 16), window_size=8, convolution=False).num_branches == 1


@pytest.mark.parametrize(
    ("name", "mlp", "norm"),
    [("iwin", "gelu", "layer_norm"), *((name, "swiglu", "rms_norm") for name in MIXERS)],
)
def test_a_block_compiles_without_a_graph_break(name, mlp, norm):
    options = {"window_size": 4} if "window_size" in MIXERS[name].fields else {}
    mixer = MixerSpec(name, **options)
    spec = BlockSpec(WIDTH, HEADS, mixer=mixer, mlp=mlp, norm=norm, qk_norm=name != "swin_v2")
    frames = (2,) if name == "factorised" else ()
    block = Block(spec, (*frames, 8, 8), index=1)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for grid in ((8, 8), (6, 10)):  # divided by the window, and padded
        x, condition = torch.randn(2, *frames, *grid, WIDTH), torch.randn(2, WIDTH)
        rope = None if frames else rope_angles(grid, WIDTH // HEADS, x.device)
        torch.testing.assert_close(compiled(x, condition, rope), block(x, condition, rope))


def test_modulation_widths():
    """6 C and 4 C, plus C for the convolution's gate."""
    for options, chunks in (
        (dict(), 7),
        (dict(modulation_shift=False), 5),
        (dict(mixer=MixerSpec("global")), 6),
        (dict(mixer=MixerSpec("global"), modulation_shift=False), 4),
    ):
        assert (
            Block(BlockSpec(WIDTH, HEADS, **options), (16, 16)).modulation.linear.out_features
            == chunks * WIDTH
        )


def test_open_and_closed_gates_at_the_start():
    x, condition = torch.randn(1, 8, 8, WIDTH), torch.randn(1, WIDTH)
    for open_gates in (True, False):
        block = Block(BlockSpec(WIDTH, HEADS, open_gates=open_gates), (8, 8))
        torch.nn.init.zeros_(block.modulation.linear.weight)
        torch.nn.init.zeros_(block.modulation.linear.bias)
        assert torch.equal(block(x, condition), x) is not open_gates


def test_bad_specs_say_what_would_fit():
    with pytest.raises(ValueError, match="7 heads do not divide the width 48; nearest that do: 4, 6, 8"):
        BlockSpec(48, 7)
    with pytest.raises(ValueError, match="the global mixer has no window_size"):
        MixerSpec("global", window_size=4)
    with pytest.raises(ValueError, match="expected an odd number"):
        MixerSpec(kernel_size=2)
    with pytest.raises(ValueError, match="expected positive integers, 'auto' or 'all'"):
        MixerSpec(window_size=0)


def test_bad_choices_of_a_model_are_named():
    from iwin_dit.models.transformer import IwinDiTTransformer2DModel

    for options, message in (
        (dict(norm="batch_norm"), "norm is 'batch_norm', expected rms_norm or layer_norm"),
        (dict(mlp="relu"), "mlp is 'relu', expected swiglu or gelu"),
        (dict(position_embedding="learned"), "position_embedding is 'learned', expected one of none, sincos"),
        (dict(mixer={"name": "mamba"}), "mixer.name is 'mamba'"),
        (dict(sample_size=15, patch_size=2), "the patch size 2 does not divide the latent size 15 x 15"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            IwinDiTTransformer2DModel(num_layers=1, **options)
    with pytest.raises(ValueError, match="unknown size 'XXL/2', expected one of S, B, L"):
        IwinDiTTransformer2DModel.from_size("XXL/2")
