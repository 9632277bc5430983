"""What AdamW is given: rates, which weights decay, gradients that are clipped or not; and averages."""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import assert_equal, make_model, read_checkpoint
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from iwin_dit.config.common import OptimizerConfig
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.training import optimizer
from iwin_dit.training.ema import make_ema, update_ema
from iwin_dit.training.optimizer import (
    build_optimizer,
    learning_rate,
    named_state,
    parameter_groups,
    step_if_finite,
)

TABLES = {
    "iwin": (),
    "swin": ("bias_table",),
    "swin_v2": ("attention.logit_scale", "bias_network.0.weight", "bias_network.2.weight"),
}
MATRICES = ("attention.qkv.weight", "attention.proj.weight")


@pytest.mark.parametrize("mixer", TABLES)
def test_only_matrices_and_kernels_decay(mixer):
    """As timm's Swin and Swin V2 say in ``no_weight_decay``; embeddings neither."""
    model = make_model(mixer={"name": mixer, "window_size": 4}, num_layers=1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, others = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], others["weight_decay"]) == (0.1, 0)
    decaying, undecayed = ({names[id(p)] for p in group["params"]} for group in (decay, others))
    assert not decaying & undecayed
    assert decaying | undecayed == set(names.values())
    tables = ("label_embedding.weight", *TABLES[mixer])
    found = [name for name in undecayed if model.get_parameter(name).ndim > 1]
    assert len(found) == len(tables)
    assert all(name.endswith(tables) for name in found)
    convolutions = ("convolution.conv.weight",) if mixer == "iwin" else ()
    assert {f"blocks.0.mixer.{name}" for name in (*MATRICES, *convolutions)} == {
        name for name in decaying if ".mixer." in name
    }
    assert {"patch_embed.proj.weight", "proj_out.weight"} < decaying


def test_gradients_need_not_be_clipped(recipe, train_here, tmp_path):
    """Without a limit it is as with one that none reaches, and the norm is in the log all the same."""
    config = recipe(train={"max_steps": 4, "save_every_steps": 4}, objective={"cosine_weight": 100.0})
    for limit in ("null", "1e30", "1.0"):
        arguments = ("--output_dir", tmp_path / limit, "--optimizer.max_grad_norm", limit)
        code, output = train_here("--config", config, *arguments)
        assert code == 0, output
    states = {limit: read_checkpoint(tmp_path / limit, 4) for limit in ("null", "1e30", "1.0")}
    assert_equal(states["null"], states["1e30"])
    with pytest.raises(AssertionError):
        assert_equal(states["null"], states["1.0"])
    records = [json.loads(line) for line in (tmp_path / "null" / "log.jsonl").read_text().splitlines()]
    assert all(record["grad_norm"] > 2 for record in records)


def test_what_is_not_finite_is_seen_without_a_limit(recipe, train_here, monkeypatch):
    real, calls = FlowMatching.loss, []

    def loss(self, *arguments):
        value = real(self, *arguments)
        calls.append(value)
        if len(calls) == 2:
            value.register_hook(lambda gradient: gradient * torch.inf)
        return value

    monkeypatch.setattr(FlowMatching, "loss", loss)
    config = recipe(train={"max_steps": 4}, optimizer={"max_grad_norm": None})
    code, output = train_here("--config", config)
    assert code == 4, output
    assert "diverged at step 2" in output


def test_learning_rate_warms_up_and_stays():
    options = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(step, options, 8) for step in range(8)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    )
    assert learning_rate(0, OptimizerConfig(learning_rate=3e-4), 8) == 3e-4


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_comes_down_to_the_least(schedule):
    """PyTorch's own schedules, after the warm-up."""
    options = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule=schedule, min_learning_rate=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = {
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1),
        "linear": lambda: LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=10),
    }
    theirs = schedules[schedule]()
    for step in range(3, 14):
        assert learning_rate(step, options, 13) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert learning_rate(20, options, 13) == pytest.approx(0.1)


def test_ema_is_the_weighted_sum():
    model = torch.nn.Linear(3, 2)
    ema, decay = make_ema(model), 0.9
    expected = model.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        update_ema(ema, model, decay)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weight, expected)
    assert not ema.weight.requires_grad


def test_an_average_has_the_statistics_of_its_model():
    """With those of its beginning a network with BatchNorm answers as if it were not trained."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ema, x = make_ema(model), 5 + torch.randn(64, 3)
    for _ in range(50):
        model(x)
        update_ema(ema, model, 0.0)  # the average is the model
    torch.testing.assert_close(ema(x), model.eval()(x))


def test_an_average_is_of_its_own_model():
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2)]
    models[2].register_buffer("count", torch.zeros(1))
    for model in models[1:]:
        for average, other in ((make_ema(models[0]), model), (make_ema(model), models[0])):
            with pytest.raises(ValueError, match="zip"):
                update_ema(average, other, 0.9)


@pytest.fixture(params=["adamw", "muon", "sgd", "radam", "adafactor"])
def options(request, monkeypatch):
    """The options of an optimiser: ours, fused, and three that know nothing of steps that are not finite."""
    kinds = {
        "sgd": lambda model, groups, options: torch.optim.SGD(groups, options.learning_rate, momentum=0.9),
        "radam": lambda model, groups, options: torch.optim.RAdam(groups, options.learning_rate),
        "adafactor": lambda model, groups, options: torch.optim.Adafactor(groups, options.learning_rate),
    }
    monkeypatch.setattr(optimizer, "OPTIMIZERS", optimizer.OPTIMIZERS | kinds)
    return OptimizerConfig(name=request.param, learning_rate=1e-2)


def test_each_name_of_a_recipe_has_an_optimiser():
    names = get_type_hints(OptimizerConfig)["name"]
    assert set(get_args(names)) == set(optimizer.OPTIMIZERS)


def test_a_step_that_is_not_finite_changes_nothing(options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken = build_optimizer(model, parameter_groups(model, 0.1), options)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    for factor in (1.0, torch.nan, 1.0):
        before = {**model.state_dict(), **named_state(taken, model)}
        before = {name: tensor.clone() for name, tensor in before.items()}
        (model(torch.randn(4, 3)).square().sum() * factor).backward()
        step_if_finite(taken, torch.tensor(float(factor != 1)))
        taken.zero_grad()
        after = {**model.state_dict(), **named_state(taken, model)}
        assert after.keys() == before.keys(), "the state exists from the start"
        same = all(torch.equal(tensor, before[name]) for name, tensor in after.items())
        assert same == (factor != 1)


def test_an_optimiser_starts_as_pytorchs_own(options):
    """The state that is made at the start is the one that a first step would have made."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    made, lazy = (optimizer.OPTIMIZERS[options.name](m, parameter_groups(m, 0.0), options) for m in models)
    optimizer.make_state(made)
    for _ in range(3):
        x = torch.randn(4, 3)
        for model, each in zip(models, (made, lazy), strict=True):
            model(x).square().sum().backward()
            each.step()
            each.zero_grad()
    assert torch.equal(models[0].weight, models[1].weight)


def test_a_state_that_no_checkpoint_keeps_is_refused(monkeypatch):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["calls"] = 1

    monkeypatch.setitem(optimizer.OPTIMIZERS, "adamw", lambda model, groups, options: Counting(groups))
    model = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match="adamw keeps calls as a int, expected a tensor"):
        build_optimizer(model, parameter_groups(model, 0.0), OptimizerConfig())


def test_optimiser_state_makes_the_round_trip(options):
    """A second optimiser that was given the state of the first takes the same step."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(m, parameter_groups(m, 0.1), options) for m in models]
    x = torch.randn(4, 3)

    def step(i):
        models[i](x).square().sum().backward()
        optimizers[i].step()
        optimizers[i].zero_grad()

    step(0)
    models[1].load_state_dict(models[0].state_dict())
    mine, other = (named_state(o, m) for o, m in zip(optimizers, models, strict=True))
    for key, value in other.items():
        value.copy_(mine[key])
    step(0)
    step(1)
    assert torch.equal(models[0].weight, models[1].weight)
    assert optimizers[0].param_groups[1]["weight_decay"] == 0, "biases do not decay"
