"""What AdamW is given: which weights decay, and gradients that are clipped or not."""

import json

import pytest
import torch
from conftest import assert_equal, make_model, read_checkpoint

from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.training.optimizer import parameter_groups

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
