"""Muon: the iteration in closed form, PyTorch's own Muon, which matrices it takes, memory, resume."""

import inspect

import pytest
import torch
from conftest import make_model
from torch import nn

from iwin_dit.build.budget import Budget
from iwin_dit.build.network import build_model
from iwin_dit.config.common import OptimizerConfig
from iwin_dit.config.schema import Config, ModelConfig
from iwin_dit.training import muon
from iwin_dit.training.muon import AT_ONCE, COEFFICIENTS, STEPS, Muon, matrices_apart, orthogonalize
from iwin_dit.training.optimizer import build_optimizer, named_state, parameter_groups, step_if_finite

OPTIONS = OptimizerConfig(name="muon", learning_rate=1e-2)


@pytest.mark.parametrize("shape", [(3, 40, 24), (24, 40), (2, 2, 16, 16)])
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(x), u @ torch.diag_embed(s) @ vh)
    assert s.max() < 1.25
    if shape != (2, 2, 16, 16):  # square ones may have a value near 0
        assert s.min() > 0.6


def test_no_more_numbers_than_fit_are_computed_together(monkeypatch):
    parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in range(5)] + [nn.Parameter(torch.zeros(2, 3))]
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    assert [len(alike) for alike in muon._alike(parameters)] == [4, 1]
    monkeypatch.setattr(muon, "AT_ONCE", 25)
    assert [len(alike) for alike in muon._alike(parameters)] == [2, 2, 1]
    assert 2**24 <= AT_ONCE <= 2**28, "a few hundred MB of float32"


def test_the_coefficients_are_those_of_pytorch():
    theirs = inspect.signature(torch.optim.Muon).parameters
    assert theirs["ns_coefficients"].default == COEFFICIENTS
    assert theirs["ns_steps"].default == STEPS


def test_a_matrix_without_a_gradient_does_not_move():
    assert torch.equal(orthogonalize(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_pytorch(decay):
    """torch.optim.Muon, which computes in bf16; three matrices, one above the other, are three of its own."""
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(3 * 20, 24))
    theirs = [nn.Parameter(part.clone()) for part in mine.detach().chunk(3)]
    group = {"params": [mine], "stacked": 3} | ({"weight_decay": decay} if decay else {})
    taken = Muon([group], 1e-2, (0.9, 0.95), 1e-8)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    start = mine.detach().clone()
    for _ in range(5):
        mine.grad = torch.randn_like(mine)
        for parameter, part in zip(theirs, mine.grad.chunk(3), strict=True):
            parameter.grad = part.clone()
        taken.step()
        other.step()
    moved, expected = mine - start, torch.cat(theirs) - start
    assert (moved - expected).norm() < 0.02 * expected.norm()


def test_everything_but_matrices_of_blocks_is_adamws():
    """AdamW by itself moves these tensors to the same bits."""
    torch.manual_seed(0)
    models = [make_model(num_layers=2, mixer={"name": "iwin", "window_size": 4}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = [OPTIONS, OptimizerConfig(learning_rate=1e-2)]
    optimizers = [
        build_optimizer(model, parameter_groups(model, 0.1), option)
        for model, option in zip(models, options, strict=True)
    ]
    gradients = [torch.randn_like(parameter) for parameter in models[0].parameters()]
    for model, optimizer in zip(models, optimizers, strict=True):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    ours, theirs = (model.state_dict() for model in models)
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    parts = ("mixer.attention.qkv", "mixer.attention.proj", "mlp.gate_up", "mlp.down", "modulation.linear")
    assert differ == {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}


def test_stacked_matrices_are_counted():
    model = make_model(num_layers=1, mixer={"name": "iwin", "window_size": 4})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = matrices_apart(model, parameter_groups(model, 0.1))
    counts = {names[id(p)]: group["stacked"] for group in groups for p in group["params"]}
    assert len(counts) == len(names)
    found = {name: count for name, count in counts.items() if count}
    width = model.config.num_attention_heads * model.config.attention_head_dim
    rows = model.blocks[0].modulation.linear.weight.shape[0] // width
    assert found == {
        "blocks.0.mixer.attention.qkv.weight": 3,
        "blocks.0.mixer.attention.proj.weight": 1,
        "blocks.0.mlp.gate_up.weight": 2,
        "blocks.0.mlp.down.weight": 1,
        "blocks.0.modulation.linear.weight": rows,
    }


def test_the_state_takes_a_third_less():
    """Of a network whose weights are nearly all matrices of blocks, as those of large ones are."""
    model = make_model(num_layers=6)
    sizes = [
        sum(tensor.nbytes for tensor in named_state(build_optimizer(model, groups, options), model).values())
        for options in (OPTIONS, OptimizerConfig())
        for groups in [parameter_groups(model, 0.0)]
    ]
    assert sizes[0] < 2 / 3 * sizes[1]


def test_the_budget_counts_the_state():
    """As the tensors of a real one, but for AdamW's counters of steps."""
    config = Config(optimizer=OPTIONS, model=ModelConfig(size=None, depth=2, width=32, heads=2, patch_size=1))
    model = build_model(config)
    state = named_state(build_optimizer(model, parameter_groups(model, 0.0), OPTIONS), model)
    moments = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("/step"))
    assert Budget(config).memory().optimizer == moments


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_that_is_not_finite_is_not_taken(found):
    """In the same call on the device, as AdamW's fused one."""
    model = make_model(num_layers=1)
    optimizer = build_optimizer(model, parameter_groups(model, 0.1), OPTIONS)
    before = {k: t.clone() for k, t in {**model.state_dict(), **named_state(optimizer, model)}.items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan if found else 0.1)
    step_if_finite(optimizer, torch.tensor(found))
    after = {**model.state_dict(), **named_state(optimizer, model)}
    same = [torch.equal(after[name], before[name]) for name in before]
    assert all(same) if found else not any(same)
