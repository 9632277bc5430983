"""The value residual: attention in later blocks reads the values of the first one, of the same token."""

import pytest
import torch
from conftest import give_zeros_noise, make_model
from test_layers import coordinates, same_window
from test_mixers import shifted_windows

from iwin_dit.config.rules import check
from iwin_dit.config.schema import Config, ModelConfig
from iwin_dit.layers import kernels
from iwin_dit.layers.specs import MIXERS, BlockSpec, MixerSpec
from iwin_dit.layers.token_mixer import make_mixer
from iwin_dit.layers.value_residual import ValueResidual
from iwin_dit.models.transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.training.reports import watch_blocks

WIDTH, HEADS = 16, 2
FITTING = [name for name, kind in MIXERS.items() if kind.takes_projections]


def seen(name, grid):
    """Which tokens see each other, by the definition: ``(N, N)``; windows have three tokens a side."""
    places = coordinates(grid)
    if name == "neighborhood":
        first = [(axis - 1).clamp(0, side - 3) for axis, side in zip(places.T, grid, strict=True)]
        first = torch.stack(first, -1)[:, None]
        return ((first <= places) & (places < first + 3)).all(-1)
    if name == "swin":
        return shifted_windows(grid, (3,) * len(grid), [3 // 2 if side > 3 else 0 for side in grid])
    if name == "iwin":
        return same_window(grid, (3,) * len(grid))
    return torch.ones(len(places), len(places), dtype=torch.bool)


@pytest.mark.parametrize("grid", [(6, 9), (5, 7), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("name", FITTING)
def test_values_are_mixed_where_tokens_stand(name, grid):
    """All N^2 scores with those outside the window at minus infinity, in any windows; and the gradients."""
    torch.manual_seed(0)
    mixer = MixerSpec(name, **({} if name == "global" else {"window_size": 3}))
    mixer = make_mixer(BlockSpec(WIDTH, HEADS, mixer=mixer, value_residual=True), grid, index=1).double()
    if name == "swin":
        torch.nn.init.zeros_(mixer.relative_bias.bias_table)
    residual = ValueResidual().double()
    torch.nn.init.constant_(residual.share, 0.3)
    x, first = torch.randn(2, 2, *grid, WIDTH, dtype=torch.float64).requires_grad_()
    found = mixer.branches(x, None, residual(mixer.project(x), first))[0]

    share = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    qkv = (x @ mixer.attention.qkv.weight.T + mixer.attention.qkv.bias).flatten(1, -2)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    v = share * first.flatten(1, -2).unflatten(-1, (HEADS, -1)).transpose(1, 2) + (1 - share) * v
    scores = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(~seen(name, grid), -torch.inf)
    expected = mixer.attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, (x, first, residual.share), cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, first, share), cotangent))


def model_and_inputs(rank=2, **options):
    options = {"num_layers": 3, "value_residual": True, "mixer": {"name": "global"}} | options
    options.setdefault("position_embedding", "sincos")
    if rank == 2:
        model = make_model(**options)
    else:
        sizes = dict(sample_frames=2, sample_size=8, in_channels=4, num_classes=3)
        heads = dict(num_attention_heads=2, attention_head_dim=8)
        torch.manual_seed(0)
        model = give_zeros_noise(IwinDiTTransformer3DModel(**sizes, **heads, **options)).eval()
    x = torch.randn(2, 4, *model.latent_size, generator=torch.Generator().manual_seed(1))
    return model, (x, torch.tensor([300.0, 700.0]), torch.tensor([0, 3]))


@pytest.mark.parametrize("post_norm", [False, True])
def test_later_blocks_read_the_values_of_the_first(post_norm):
    """A model without, in which hooks on the projections of attention change what they return."""
    model, inputs = model_and_inputs(post_norm=post_norm)
    shares = [0.2, 0.9]
    for block, share in zip(model.blocks[1:], shares, strict=True):
        torch.nn.init.constant_(block.value_residual.share, share)
    plain, _ = model_and_inputs(value_residual=False, post_norm=post_norm)
    assert plain.state_dict().keys() == {n for n in model.state_dict() if "value_residual" not in n}
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "value_residual" not in n})
    values = []

    def remember(module, inputs, output):
        values.append(output[..., 2 * WIDTH :])

    def mix(share):
        def change(module, inputs, output):
            v = share * values[0] + (1 - share) * output[..., 2 * WIDTH :]
            return torch.cat([output[..., : 2 * WIDTH], v], -1)

        return change

    hooks = [remember, *map(mix, shares)]
    for block, hook in zip(plain.blocks, hooks, strict=True):
        block.mixer.attention.qkv.register_forward_hook(hook)
    found, expected = model(*inputs).sample, plain(*inputs).sample
    torch.testing.assert_close(found, expected)
    names = [f"blocks.{i}.mixer.attention.qkv.weight" for i in range(3)]
    gradients = [
        torch.autograd.grad(output.square().sum(), [net.get_parameter(name) for name in names])
        for net, output in ((model, found), (plain, expected))
    ]
    torch.testing.assert_close(*gradients)


def test_a_share_of_zero_is_a_model_without():
    model, inputs = model_and_inputs(mixer={"window_size": 4})
    plain, _ = model_and_inputs(mixer={"window_size": 4}, value_residual=False)
    state = {name: t for name, t in model.state_dict().items() if "value_residual" not in name}
    plain.load_state_dict(state)
    assert not torch.allclose(model(*inputs).sample, plain(*inputs).sample)
    for block in model.blocks[1:]:
        assert block.value_residual.share.tolist() == [0.5], "at the start"
        torch.nn.init.zeros_(block.value_residual.share)
    torch.testing.assert_close(model(*inputs).sample, plain(*inputs).sample)


@pytest.mark.parametrize("rank", [2, 3])
def test_checkpointing_and_compilation_change_nothing(rank):
    model, inputs = model_and_inputs(rank, mixer={"window_size": 4})

    def gradients():
        model.zero_grad()
        model(*inputs).sample.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    assert expected["blocks.1.value_residual.share"].any()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), expected)
    model.disable_gradient_checkpointing()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(), expected, atol=1e-4, rtol=1e-4)
    with watch_blocks(model, active=True) as health:
        model(*inputs)
    assert health["activation_rms"].shape == (3,)


@pytest.mark.skipif(not kernels.INSTALLED, reason="triton is not installed")
def test_the_kernel_serves_mixed_values():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = model_and_inputs(mixer={"window_size": 4}, num_layers=2)
    model, inputs = model.to(device), [tensor.to(device) for tensor in inputs]
    with torch.no_grad():
        kernels.select("torch")
        expected = model(*inputs).sample
        kernels.select("triton")
        try:
            found = model(*inputs).sample
        finally:
            kernels.select("auto")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_mix(dtype):
    model, (x, time, labels) = model_and_inputs(mixer={"window_size": 4})
    assert model.to(dtype)(x.to(dtype), time, labels).sample.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model.float()(x, time, labels).sample).all()


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in FITTING])
def test_mixers_without_one_projection_are_refused(name):
    model = ModelConfig("B/1", sample_frames=4, mixer=MixerSpec(name), value_residual=True)
    message = f"value_residual: the {name} mixer has none; take iwin, global, swin, neighborhood"
    with pytest.raises(ConfigError, match=message):
        check(Config(model=model))
    with pytest.raises(ValueError, match=message):
        IwinDiTTransformer2DModel(mixer={"name": name}, value_residual=True)
