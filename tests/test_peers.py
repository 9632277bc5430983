"""The benchmark of whole models, at toy size."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.layers import kernels
from iwin_dit.layers.specs import SIZES
from iwin_dit.runtime.errors import ConfigError

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers
import peers_models
from peers_models import MAKERS, Case, Roster, Shape

SHAPE = Shape(depth=6, width=32, heads=2, patch=1)
SIDE, WINDOW, BATCH = 8, 4, 2
TRAINING = Case(SHAPE, SIDE, BATCH, training=True, device="cpu", bf16=False)


@pytest.fixture
def table(monkeypatch, capsys):
    """Runs the benchmark in this process, and returns its rows."""

    def run(*arguments):
        monkeypatch.setitem(SIZES, "toy", (2, 32, 2))
        monkeypatch.setattr(peers, "matmul_rate", lambda dtype, device: 1e11)
        monkeypatch.setattr(peers, "keep_freed_memory", lambda: None)
        monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
        peers.main()
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]

    return run


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_every_peer_trains_and_samples(name, bf16):
    peer = replace(TRAINING, bf16=bf16).make(name)
    assert len(getattr(peer.model, "blocks", None) or peer.model.transformer_blocks) == SHAPE.depth
    before = {key: weight.clone() for key, weight in peer.model.named_parameters()}
    peer.step()
    for key, weight in peer.model.named_parameters():  # every branch takes part
        assert not torch.equal(weight, before[key]), key

    sampler = replace(TRAINING, training=False, bf16=bf16).make(name)
    sampler.step()
    with torch.inference_mode():
        sample = sampler.model(*sampler.arguments, return_dict=False)[0]
    assert sample.shape == (BATCH, 32, SIDE, SIDE)
    assert sample.isfinite().all()
    assert sample.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert not any(weight.grad is not None for weight in sampler.model.parameters())


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "natten"])
def test_multiply_adds_are_those_that_run(name):
    sampler = replace(TRAINING, training=False, batch=1).make(name)
    # of the attention that a CPU would choose the counter knows nothing
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sampler.step()
    assert peers_models.multiply_adds(name, SHAPE, SIDE) == counter.get_total_flops() // 2


def test_multiply_adds_differ_by_attention_and_convolution():
    adds = {name: peers_models.multiply_adds(name, SHAPE, SIDE) for name in MAKERS}
    depth, width, tokens = SHAPE.depth, SHAPE.width, SIDE**2
    assert peers_models.window_of(SIDE) == WINDOW
    convolution_and_gate = 9 * tokens * width + width**2
    less = 2 * tokens * width * (tokens - WINDOW**2) - convolution_and_gate
    assert adds["global"] - adds["iwin"] == depth * less
    # a neighbourhood is odd
    assert adds["global"] - adds["natten"] == depth * 2 * tokens * width * (tokens - (WINDOW - 1) ** 2)


@pytest.mark.parametrize("name", ["iwin", "diffusers", "swin"])
def test_memory_is_that_of_real_tensors(name):
    peer, kept = TRAINING.make(name), {}
    own = {t.data_ptr() for t in [*peer.model.parameters(), *peer.model.buffers(), *peer.arguments]}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = peers_models.loss_of(peer.model, *peer.arguments)
    saved = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    del loss
    assert peers_models.saved_bytes(name, SHAPE, SIDE, BATCH, bf16=False) == pytest.approx(saved, rel=0.01)

    peer.step()
    held = 3 * peers_models.weight_bytes(name, SHAPE, SIDE)  # a buffer has no moments
    assert held == pytest.approx(peer.resident_bytes(), rel=0.2 if name == "swin" else 0.01)


def test_the_table(table):
    head, *rows = table("--size", "toy/1", "--tokens", "64", "--batch-tokens", "128", "--rounds", "2")
    assert head == list(peers.COLUMNS)
    models = ["iwin", "global", "diffusers", "swin", "natten"]
    assert [row[:4] for row in rows] == [
        ["64", "2", step, name] for step in ("training", "sampling") for name in models
    ]
    for row in rows:
        if row[3] == "natten":
            assert row[4] in ("not installed", "no backward on a CPU")
        else:
            assert float(row[4]) > 0
            assert float(row[6]) > 0.9
            assert row[7].endswith("%")
        if row[3] == "iwin":
            assert row[5:7] == ["**1.00**", "1.00"]


def test_ratios_are_of_rounds_and_shares_of_the_rate():
    iwin = peers.Times("iwin", "none", seconds=[1.0, 2.0, 4.0])
    other = peers.Times("global", "none", seconds=[2.0, 3.0, 5.0])
    row = peers.cells(other, [iwin, other], {"iwin": 100, "global": 130}, TRAINING, rate=2600.0)
    assert row[4:8] == ["3000", "**1.50**", "1.30", "20%"]  # 2 operations x 130 x 3 passes x 2 images / 3 s


def test_without_memory_training_is_left_out(table, monkeypatch):
    monkeypatch.setattr(peers_models, "available_bytes", lambda: 0)
    _, *rows = table("--size", "toy/1", "--tokens", "16", "--models", "iwin", "swin", "--rounds", "1")
    assert [row[4] for row in rows[:2]] == ["does not fit the memory"] * 2
    assert all(float(row[4]) > 0 for row in rows[2:])


def test_short_of_memory_one_model_is_held_at_a_time(monkeypatch):
    held, running = TRAINING.needed_bytes("iwin")
    monkeypatch.setattr(peers_models, "available_bytes", lambda: 1.1 * peers_models.MARGIN * (held + running))
    roster, rows = Roster(TRAINING, ["iwin", "global"], "none"), [peers.Times("global", "none")]
    assert not roster.keep
    assert not roster.left_out
    peers.Clock(2, "auto", "auto", deadline=float("inf")).measure(roster, rows, peers.progress(disable=True))
    assert len(rows[0].seconds) == 2
    assert not roster.peers
    monkeypatch.setattr(peers_models, "available_bytes", lambda: 4 * peers_models.MARGIN * (held + running))
    assert Roster(TRAINING, ["iwin", "global"], "none").keep


def test_nothing_begins_after_the_budget(table):
    _, *rows = table("--size", "toy/1", "--tokens", "16", "--models", "iwin", "--budget-seconds", "0")
    assert [row[4] for row in rows] == ["no time left"] * 2


def test_kernels_are_selected_for_a_step_alone():
    row = peers.Times("iwin", "none")
    clock = peers.Clock(1, "torch", "auto", deadline=float("inf"))
    seen = []
    clock.attempt(Roster(TRAINING, ["iwin"], "none"), row, lambda peer, row: seen.append(kernels._selection))
    assert seen == ["torch"]
    assert kernels._selection == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge/1"], "--size: unknown size 'huge/1', expected one of S, B"),
        (["--tokens", "200"], "--tokens has 200"),
        (["--steps", "inference"], "--steps has 'inference'"),
        (["--compile", "blocks", "model"], "take one of them"),
    ],
)
def test_mistakes_are_explained(table, arguments, message):
    with pytest.raises(ConfigError, match=message):
        table(*arguments)
