"""The Triton kernels, in Triton's interpreter where there is no GPU, against PyTorch in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from iwin_dit.layers import kernels, windows
from iwin_dit.layers.kernels import attention, convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = [  # grid, window, heads, channels of a head
    ((8, 8), (4, 4), 2, 8),
    ((7, 5), (4, 3), 3, 16),  # padded: windows of 3 or 4 by 2 or 3 tokens
    ((5, 7), (5, 7), 1, 72),  # the whole grid, 35 tokens
    ((8, 8), (8, 4), 1, 8),  # 32 tokens, no padding
    ((3, 4, 5), (2, 4, 3), 1, 24),  # of clips, padded along two axes
]
CONVOLUTION = [  # grid, channels, kernel
    ((5, 7), 12, (3, 3)),
    ((4, 3), 8, (5, 5)),  # the kernel is wider than the grid
    ((3, 2, 4), 8, (3, 3, 3)),
    ((2, 3, 4), 20, (1, 3, 3)),
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """PyTorch fills what ``torch.empty`` returns, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    kernels.select("auto")


@pytest.fixture(params=["as shipped", "many tiles"])
def tiles(request, monkeypatch):
    """The shipped tiles hold a toy window whole; tiles of 16 tokens need the loops."""
    if request.param == "many tiles":
        small = {name: {1: attention.Tile(16, 16, 4, 1)} for name in attention.TILES}
        monkeypatch.setattr(attention, "TILES", small)
        small = {name: {1: convolution.Tile(8, 16, 4, 2)} for name in convolution.TILES}
        monkeypatch.setattr(convolution, "TILES", small)


def random(*shape, seed=0):
    """Between NaNs: a kernel that reads beyond its tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((3, *shape), float("nan"))
    memory[1] = torch.randn(shape, generator=generator)
    return memory.to(DEVICE)[1]


def plain_attention(qkv, window, heads):
    grid = tuple(qkv.shape[1:-1])
    padded = windows.padded_grid(grid, window)
    real = windows.partition(windows.real_tokens(grid, padded, qkv.device), window)  # (G, N, 1)
    real = real.repeat(len(qkv), 1, 1)[:, None, None, :, 0]
    rows = windows.partition(windows.pad(qkv, padded), window)
    q, k, v = rows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real).transpose(1, 2).flatten(2)
    return windows.crop(windows.reverse(out, window, padded), grid)


def plain_convolution(x, weight, bias, residual, gate, attended=None, attended_gate=None):
    conv = {4: F.conv2d, 5: F.conv3d}[x.ndim]
    padding = [side // 2 for side in weight.shape[2:]]
    y = conv(x.movedim(-1, 1), weight, bias, padding=padding, groups=len(weight)).movedim(1, -1)
    return residual + gate * y + (0 if attended is None else attended_gate * attended)


def assert_equal(kernel, plain, tensors, forward=1e-5, backward=1e-4):
    """Values and the gradients of all tensors, against those of float64."""
    ours = [tensor.detach().requires_grad_() for tensor in tensors]
    theirs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, expected = kernel(*ours), plain(*theirs)
    grad = random(*out.shape, seed=9).to(out.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, atol=forward, rtol=forward)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            one.grad.double(), other.grad, atol=backward, rtol=backward, msg=lambda m, n=number: f"{n}: {m}"
        )


@pytest.mark.parametrize(("grid", "window", "heads", "head_width"), ATTENTION)
def test_attention_equals_sdpa(grid, window, heads, head_width, tiles):
    assert_equal(
        lambda qkv: kernels.interleaved_attention(qkv, window, heads),
        lambda qkv: plain_attention(qkv, window, heads),
        [random(2, *grid, 3 * heads * head_width)],
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_attention_of_large_scores_in_padded_windows(tiles):
    """Keys that do not exist would overflow where all others score far below them."""
    qkv = random(1, 3, 5, 3 * 8)
    qkv[..., :8], qkv[..., 8:16] = 40, -qkv[..., 8:16].abs() * 20 - 20
    assert_equal(
        lambda qkv: kernels.interleaved_attention(qkv, (2, 3), 1),
        lambda qkv: plain_attention(qkv, (2, 3), 1),
        [qkv],
        forward=1e-4,  # scores are about -9,000, float32 keeps three decimals of them
        backward=2e-2,
    )


HALF = {"forward": 2e-2, "backward": 5e-2}  # tolerances


# Triton's interpreter takes products of bfloat16 for those of integers
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
def test_attention_in_half_precision(dtype):
    assert_equal(
        lambda qkv: kernels.interleaved_attention(qkv, (4, 4), 1),
        lambda qkv: plain_attention(qkv, (4, 4), 1),
        [random(1, 4, 4, 3 * 24).to(dtype)],
        **HALF,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_in_half_precision(dtype):
    x, weight, bias, residual, *others = convolution_tensors((3, 4), 8, (3, 3))
    tensors = [x.to(dtype), weight, bias, residual, *(tensor.to(dtype) for tensor in others)]
    assert_equal(kernels.depthwise_convolution, plain_convolution, tensors, **HALF)


def convolution_tensors(grid, channels, kernel):
    """x, weight, bias, residual, gate, attention's branch and its gate; gates are chunks of one tensor."""
    gates = random(2, *[1] * len(grid), 3 * channels, seed=4)
    return [
        random(2, *grid, channels),
        random(channels, 1, *kernel, seed=1),
        random(channels, seed=2),
        random(2, *grid, channels, seed=3),
        gates.chunk(3, dim=-1)[1],
        random(2, *grid, channels, seed=6),
        gates.chunk(3, dim=-1)[2],
    ]


@pytest.mark.parametrize(("grid", "channels", "kernel"), CONVOLUTION)
def test_convolution_equals_torch(grid, channels, kernel, tiles):
    tensors = convolution_tensors(grid, channels, kernel)
    assert_equal(kernels.depthwise_convolution, plain_convolution, tensors)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (8,)])
def test_one_gate_for_all_images(shape):
    *tensors, _, attended, _ = convolution_tensors((3, 4), 8, (3, 3))
    gates = random(*shape, seed=5), random(*shape, seed=7)
    alone = [*tensors, gates[0]]
    assert_equal(kernels.depthwise_convolution, plain_convolution, alone)
    assert_equal(kernels.depthwise_convolution, plain_convolution, [*alone, attended, gates[1]])


def test_compiles_without_graph_breaks():
    """Both kernels in one graph, forward and backward; what surrounds them is traced."""

    def step(qkv, x, weight, bias, residual, gate, other_gate):
        attended = kernels.interleaved_attention(2 * qkv, (2, 2), 1)
        return kernels.depthwise_convolution(x, weight, bias, residual, gate, attended, other_gate).sin()

    *others, _, gate = convolution_tensors((3, 4), 8, (3, 3))
    tensors = [random(2, 3, 4, 3 * 8), *others, gate]
    eager = [tensor.detach().requires_grad_() for tensor in tensors]
    traced = [tensor.detach().requires_grad_() for tensor in tensors]
    expected = step(*eager)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    expected.sum().backward()  # an expanded gradient
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    for one, other in zip(traced, eager, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_operators_are_registered_as_pytorch_asks():
    """Fake tensors have the shapes, dtypes and strides of real ones; nothing is mutated or aliased."""
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    qkv = random(1, 3, 4, 3 * 8).requires_grad_()
    torch.library.opcheck(attention.attend, (qkv, (2, 2), 1), test_utils=utils)
    x, weight, bias, residual, gate, attended, other_gate = (
        tensor.detach().requires_grad_() for tensor in convolution_tensors((3, 4), 8, (3, 3))
    )
    tensors = x, weight.flatten(1).T, bias, residual, gate.flatten(1), attended, other_gate.flatten(1)
    torch.library.opcheck(convolution.convolve, (*tensors, (3, 3)), test_utils=utils)


def test_selection():
    cpu = torch.zeros(1, 4, 4, 24)
    assert not kernels.use_attention(cpu, 8)
    assert not kernels.use_convolution(cpu, 9)
    kernels.select("triton")
    assert kernels.use_attention(cpu, 8)
    assert kernels.use_convolution(cpu, 9)
    assert not kernels.use_attention(cpu.double(), 8)
    assert not kernels.use_attention(cpu, 256)
    with pytest.raises(ValueError, match="expected one of auto, triton, torch"):
        kernels.select("cuda")


@pytest.mark.parametrize(("major", "fast"), [(7, False), (8, True), (9, True)])
def test_automatic_selection(monkeypatch, major, fast):
    """On a card that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    with FakeTensorMode():
        half, full = (
            torch.empty(1, 4, 4, 24, device="cuda", dtype=d) for d in (torch.float16, torch.float32)
        )
        assert kernels.use_attention(half, 8) == kernels.use_convolution(half, 9) == fast
        assert not kernels.use_attention(full, 8)
        assert not kernels.use_convolution(full, 9)
        assert not kernels.use_attention(half, 12)
        assert not kernels.use_convolution(half, 125)
        kernels.select("torch")
        assert not kernels.use_attention(half, 8)
        assert not kernels.use_convolution(half, 9)
        kernels.select("auto")
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
        assert kernels.use_attention(full, 8) == fast  # a norm has returned float32, projections will not


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "INSTALLED", False)
    with pytest.raises(ValueError, match="pip install triton"):
        kernels.select("triton")


def test_what_cannot_be_convolved_is_refused():
    tensors = convolution_tensors((3, 4), 8, (3, 3))
    with pytest.raises(ValueError, match="must be odd"):
        kernels.depthwise_convolution(tensors[0], random(8, 1, 2, 3), *tensors[2:])
