"""What all processes do together: the main process acts and is asked, the others wait and hear of it."""

from types import SimpleNamespace

import pytest
import torch

from iwin_dit.config.common import OptimizerConfig
from iwin_dit.runtime import processes
from iwin_dit.runtime.errors import ConfigError, DiskError
from iwin_dit.training import state
from iwin_dit.training.ema import decay_rules, make_ema, power_decay, power_gamma
from iwin_dit.training.optimizer import build_optimizer, parameter_groups


def process(main=True, number=1):
    return SimpleNamespace(is_main_process=main, num_processes=number, device=torch.device("cpu"))


@pytest.fixture
def sent(monkeypatch):
    """``sent``: what the main process sends; ``sent[:] = [value]``: what the others get."""
    values = []

    def broadcast(objects):
        values.extend(objects)
        return [values[0]]

    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    return values


def failing(error):
    def action():
        raise error

    return action


def test_alone_an_action_is_called(sent):
    assert processes.together(process(), lambda: 7) == 7
    error = ValueError("no")
    with pytest.raises(ValueError, match="no") as caught:
        processes.together(process(), failing(error))
    assert caught.value is error
    assert sent == [], "nobody is told"
    assert processes.shared(process(), 3) == 3


def test_the_main_process_tells_how_it_went(sent):
    assert processes.together(process(number=2), lambda: 7) == 7
    assert sent == [None]
    sent.clear()
    error = DiskError("full")
    with pytest.raises(DiskError) as caught:
        processes.together(process(number=2), failing(error))
    assert caught.value is error
    assert sent != [None]


@pytest.mark.parametrize(
    ("kind", "raised"),
    [(ConfigError, ConfigError), (DiskError, DiskError), (OSError, OSError), (KeyError, RuntimeError)],
)
def test_the_others_raise_what_the_main_process_says(sent, kind, raised):
    error = OSError(28, "found that") if kind is OSError else kind("found that")
    with pytest.raises(kind):
        processes.together(process(number=2), failing(error))
    with pytest.raises(raised, match=r"on the main process: .*found that") as caught:
        processes.together(process(main=False, number=2), pytest.fail)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None), "a full disk stays one"


def test_the_others_do_nothing_where_all_is_well(sent):
    sent[:] = [None]
    assert processes.together(process(main=False, number=2), pytest.fail) is None
    sent[:] = [5]
    assert processes.shared(process(main=False, number=2), 3) == 5


def test_whole_tensors_are_gathered_by_the_main_process_alone():
    groups = {"model": {"a": torch.ones(2)}, "ema": {"a": torch.zeros(3), "b": torch.ones(1)}}
    found = state.gather(process(), groups)
    assert all(found[g][name] is tensor for g, tensors in groups.items() for name, tensor in tensors.items())
    assert state.gather(process(main=False, number=2), groups) == {"model": {}, "ema": {}}


@pytest.mark.parametrize("number", [1, 2])
def test_values_of_the_main_process_reach_all(monkeypatch, number):
    real = torch.arange(3.0)

    def broadcast(tensor):
        assert number > 1
        return tensor.copy_(real)

    monkeypatch.setattr(state, "broadcast", broadcast)
    main, other = ({"a": torch.zeros(3), "b": torch.zeros(3)} for _ in range(2))
    state.spread(process(number=number), {"a": real.clone(), "b": real.clone()}, main)
    assert all(torch.equal(tensor, real) for tensor in main.values())
    if number > 1:
        state.spread(process(main=False, number=number), None, other)
        assert all(torch.equal(tensor, real) for tensor in other.values())


def test_a_checkpoint_holds_model_averages_and_optimiser():
    model = torch.nn.Linear(2, 1)
    optimizer = build_optimizer(model, parameter_groups(model, 0.1), OptimizerConfig())
    emas = {name: make_ema(model) for name in decay_rules([0.9, 0.5], [0.1])}
    groups = state.State(model, emas, optimizer).groups()
    assert list(groups) == ["model", "ema", "ema_0.5", "ema_std_0.1", "optimizer"]
    assert groups["model"]["weight"].data_ptr() == model.weight.data_ptr(), "by reference"
    assert set(groups["optimizer"]) == {
        f"{name}/{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert all(not tensor.any() for tensor in groups["optimizer"].values())
    assert state.Progress() == (0, 0)


def test_averages_have_their_own_decays():
    rules = decay_rules([0.9, 0.5, 0.99], [0.1, 0.05])
    assert list(rules) == ["ema", "ema_0.5", "ema_0.99", "ema_std_0.1", "ema_std_0.05"]
    for step in (1, 2, 100):
        assert [rules[name](step) for name in ("ema", "ema_0.5", "ema_0.99")] == [0.9, 0.5, 0.99]
        for std in (0.1, 0.05):
            assert rules[f"ema_std_{std}"](step) == power_decay(step, power_gamma(std))
