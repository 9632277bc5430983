"""Several processes compare their weights and their data; here one process plays all of them."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from iwin_dit.config.common import OptimizerConfig
from iwin_dit.runtime.errors import DataError, ReplicaError
from iwin_dit.training import replicas
from iwin_dit.training.ema import make_ema
from iwin_dit.training.optimizer import build_optimizer, parameter_groups
from iwin_dit.training.state import State


def make_state():
    model = make_model()
    adamw = build_optimizer(model, parameter_groups(model, 0.0), OptimizerConfig())
    return State(model, {"ema": make_ema(model)}, adamw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_one_flipped_bit_changes_the_sum(dtype):
    """Each bit of each value in turn."""
    cpu, tensor = torch.device("cpu"), (10 * torch.randn(3, 2)).to(dtype).t()
    before, size = replicas.bit_sum([tensor], cpu), tensor.element_size()
    assert replicas.bit_sum([tensor.contiguous()], cpu) == before
    for position in range(6):
        for bit in range(1 if dtype == torch.bool else 8 * size):
            flipped = tensor.clone(memory_format=torch.contiguous_format)
            flipped.view(-1).view(torch.uint8)[position * size + bit // 8] ^= 1 << bit % 8
            assert replicas.bit_sum([flipped], cpu) != before
    assert replicas.bit_sum([torch.tensor(1.0)], cpu) == 0x3F800000, "of float32, without axes"


def gathering(others):
    """An accelerator of as many more processes, whose rows are changed by these functions."""
    return SimpleNamespace(
        num_processes=1 + len(others),
        device=torch.device("cpu"),
        gather=lambda rows: torch.cat([rows, *(change(rows.clone()) for change in others)]),
    )


def same(rows):
    return rows


def other(column):
    def change(rows):
        rows[0, column] += 1
        return rows

    return change


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([same], None),
        ([other(0)], "process 1 does"),
        ([same, other(1), same], "process 2 does"),
        ([other(2), same, same, other(2)], "processes 1, 4 do"),
        ([other(0), other(0)], "process 0 does"),
    ],
)
def test_processes_with_other_weights_are_named(others, named):
    """Weights, averages and optimiser are columns of their own; most of the processes are right."""
    state = make_state()
    if named is None:
        replicas.check_weights(gathering(others), state, 7)
        return
    with pytest.raises(ReplicaError, match=rf"at step 7 {named} not hold the weights") as error:
        replicas.check_weights(gathering(others), state, 7)
    assert error.value.exit_code == 7


def test_every_part_of_the_state_is_compared():
    """One bit in the last tensor of weights, average and optimiser."""
    state, seen = make_state(), []
    accelerator = gathering([same])
    accelerator.gather = lambda rows: seen.append(rows) or rows.repeat(2, 1)
    replicas.check_weights(accelerator, state, 1)
    *_, weight = state.model.parameters()
    *_, average = state.emas["ema"].parameters()
    for tensor in (weight, average, state.optimizer.state[weight]["exp_avg_sq"]):
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        replicas.check_weights(accelerator, state, 1)
    changed = [(a != b).flatten().tolist() for a, b in pairwise(seen)]
    assert changed == [[True, False, False], [False, True, False], [False, False, True]]


def test_data_of_another_machine_are_noticed(monkeypatch):
    identity = {"vae_sha256": "a", "images": 60, "classes": ["x", "y"], "times_sha256": "b"}
    monkeypatch.setattr(replicas, "gather_object", lambda own: own + other_data)
    accelerator = SimpleNamespace(num_processes=3)
    other_data = [replicas_of(identity | {"times_sha256": "of a copy"}, monkeypatch)] * 2
    replicas.check_data(accelerator, identity)
    other_data[1] = replicas_of(identity | {"classes": ["y", "x"]}, monkeypatch)
    with pytest.raises(DataError, match=r"process 2 does not read the same data .* classes differs"):
        replicas.check_data(accelerator, identity)


def replicas_of(identity, monkeypatch):
    """What another process would send."""
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(replicas, "gather_object", lambda own: sent.extend(own) or own)
        replicas.check_data(SimpleNamespace(num_processes=2), identity)
    return sent[0]
