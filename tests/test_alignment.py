"""Alignment of the network's tokens with a teacher's, against equations that are written out."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_equal, make_model, read_checkpoint, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.build.alignment import Alignment
from iwin_dit.build.budget import Budget
from iwin_dit.build.loading import load_pipeline
from iwin_dit.build.network import build_model
from iwin_dit.config.parse import load_config
from iwin_dit.diffusion.alignment import second_uniform
from iwin_dit.diffusion.ddpm import DDPM, tables
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.objective import Objective
from iwin_dit.layers.projector import Projector
from iwin_dit.models.transformer import IwinDiTTransformer2DModel

SELF = {"teacher": "self", "student_block": 1, "teacher_block": 2}
OBJECTIVES = {"flow_matching": FlowMatching, "ddpm": DDPM}


class OneProcess:
    """Of Accelerate, what an alignment asks for."""

    @staticmethod
    def autocast():
        return torch.autocast("cpu", enabled=False)


def make_batch(images=6):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, images, 4, 8, 8, generator=generator)
    return x0, torch.arange(images) % 3, noise, torch.rand(images, generator=generator)


def make_aligned(config):
    """A model without zeros, its average, its objective and the alignment on it."""
    objective = OBJECTIVES[config.objective.name](config.objective)
    model = make_model(attention_head_dim=16, out_channels=4 * objective.kind.outputs).train()
    alignment = Alignment(config, model, objective, OneProcess)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in ema.parameters():
        parameter.mul_(1.1)
    return model, ema, objective, alignment


def watch(model, block):
    seen = []
    model.blocks[block].register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def written_out(model, ema, objective, batch, weight, time_gap):
    """The loss of self-alignment, image by image and token by token."""
    student, teacher = watch(model, 0), watch(ema, 1)
    x0, labels, noise, u = batch
    losses = objective.loss(model, *batch)
    gaps = [time_gap * (int(v * 2**24) % 2**12) / 2**12 for v in u.tolist()]  # of the lower half of 24 bits
    drawn = objective.times(u).tolist()
    if isinstance(objective, DDPM):
        times = [max(0, int(t - 1000 * gap)) for t, gap in zip(drawn, gaps, strict=True)]
        at = tables(x0.device)
        scales = [(at.sqrt_alpha_bar[t], at.sqrt_one_minus_alpha_bar[t]) for t in times]
    else:
        times = [max(0.0, t - gap) for t, gap in zip(drawn, gaps, strict=True)]
        scales = [(1 - t, t) for t in times]
        times = [1000 * t for t in times]
    with torch.no_grad():
        xt = torch.stack([a * x + b * n for (a, b), x, n in zip(scales, x0, noise, strict=True)])
        ema(xt, torch.tensor(times), labels)
    first, _, second, _, third = model.projector.layers
    total = []
    tokens = student[0].flatten(1, -2), teacher[0].flatten(1, -2)
    for loss, one, two in zip(losses, *tokens, strict=True):
        hidden = silu(silu(one @ first.weight.T + first.bias) @ second.weight.T + second.bias)
        projected = hidden @ third.weight.T + third.bias
        cosines = [a @ b / a.norm() / b.norm() for a, b in zip(projected, two, strict=True)]
        total.append(loss + weight * (1 - sum(cosines) / len(cosines)))
    return torch.stack(total)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_self_alignment_is_the_equation_written_out(name, recipe):
    options = SELF | {"time_gap": 0.3, "weight": 0.7}
    model, ema, objective, alignment = make_aligned(
        load_config(recipe(objective={"name": name}, alignment=options))
    )
    other, other_ema, batch = copy.deepcopy(model), copy.deepcopy(ema), make_batch()
    alignment.begin_step(ema, 0)
    found = alignment.loss(model, None, *batch)
    expected = written_out(other, other_ema, objective, batch, 0.7, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.mean().backward()
    expected.mean().backward()
    assert model.projector.layers[0].weight.grad.abs().max() > 0
    for (key, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    assert all(parameter.grad is None for parameter in ema.parameters())


def test_after_the_stop_the_loss_and_its_gradient_are_those_of_the_objective(recipe):
    config = load_config(recipe(alignment=SELF | {"stop_step": 7}))
    model, ema, objective, alignment = make_aligned(config)
    batch, asked = make_batch(), watch(ema, 0)
    plain = objective.loss(copy.deepcopy(model), *batch)
    alignment.begin_step(ema, 6)
    assert not torch.equal(alignment.loss(model, None, *batch), plain)
    assert len(asked) == 1
    alignment.begin_step(ema, 7)
    loss = alignment.loss(model, None, *batch)
    assert torch.equal(loss, plain)
    assert len(asked) == 1, "the teacher is asked no more"
    loss.mean().backward()
    for parameter in model.projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), "processes wait for all gradients"


def test_the_operations_of_the_teacher_are_counted(recipe):
    """All that the average computes before its second block has ended, in a forward pass alone."""
    config = load_config(recipe(model={"depth": 3}, alignment=SELF))
    budget = Budget(config)
    taught = budget.training_flops - 6 * budget.multiply_adds
    model = build_model(config)
    x0, labels, *_ = make_batch(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x0, 500.0, labels, num_blocks=2)
    assert taught == counter.get_total_flops()


def test_the_second_uniform_number_is_uniform_and_tells_nothing_of_the_first():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    second = second_uniform(u)
    assert second.min() >= 0
    assert second.max() < 1
    table = torch.histogramdd(torch.stack([u, second], 1), bins=[8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
    expected = len(u) / 64
    chi_square = ((table - expected).square() / expected).sum()  # of 63 degrees of freedom
    assert chi_square < 103.4, "which one seed in a thousand exceeds"


@pytest.mark.parametrize("rank", [2, 3])
def test_the_convolution_of_a_projector_is_a_sum_over_neighbours(rank):
    torch.manual_seed(0)
    projector = Projector("conv", 3, 2, rank)
    x = torch.randn(1, *[4] * rank, 3)
    found = projector(x)
    weight, middle = projector.layers[0].weight, (1,) * rank
    expected = projector.layers[0].bias.clone()
    for offsets in torch.cartesian_prod(*[torch.arange(-1, 2)] * rank).tolist():
        place = tuple(m + o for m, o in zip(middle, offsets, strict=True))
        kernel = weight[(slice(None), slice(None), *(o + 1 for o in offsets))]
        expected = expected + kernel @ x[(0, *place)]
    torch.testing.assert_close(found[(0, *middle)], expected)


def test_a_model_gives_its_tokens_after_so_many_blocks():
    model, (x0, labels, *_) = make_model(), make_batch()
    seen = watch(model, 1)
    (tokens,) = model(x0, 500.0, labels, num_blocks=1)
    assert not seen, "the blocks after it are left out"
    model.blocks[1] = torch.nn.Identity()
    model.blocks[1].forward = lambda x, condition, rope, values: x
    expected = watch(model, 0)
    model(x0, 500.0, labels)
    assert torch.equal(tokens, expected[0])


def test_the_projector_is_in_checkpoints_and_not_in_the_pipeline(recipe, train_here, tmp_path):
    config = recipe(train={"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 5}, alignment=SELF)
    code, output = train_here("--config", config)
    assert code == 0, output
    weights = read_checkpoint(tmp_path / "run", 4)
    for group in ("model", "ema"):
        assert any(name.startswith("projector.") for name in weights[group])
    assert any(name.startswith("projector.") for name in weights["optimizer"])
    exported = IwinDiTTransformer2DModel.from_pretrained(tmp_path / "run" / "pipeline" / "transformer")
    left = {name for name in weights["ema"] if not name.startswith("projector.")}
    assert exported.state_dict().keys() == left
    shutil.rmtree(tmp_path / "run" / "pipeline")
    assert load_pipeline(str(tmp_path / "run")).transformer.projector is None


def test_what_cannot_be_aligned_is_refused(recipe, refused_here):
    for options, words in (
        (
            dict(alignment={"teacher": "self", "student_block": 3}),
            "student_block 3 is more than the 2 blocks",
        ),
        (dict(alignment={"teacher": "self"}, ema={"on_cpu": True}), "set ema.on_cpu false"),
        (
            dict(alignment={"weight": 0.3}),
            "alignment.weight is 0.3, but is not read without alignment.teacher",
        ),
        (
            dict(alignment={"teacher": "self", "time_gap": 1.5}),
            "alignment.time_gap is 1.5, expected a number",
        ),
    ):
        assert words in refused_here("train_dit.py", "--config", recipe(**options))


def test_an_objective_that_does_not_say_what_is_earlier_is_refused(recipe, refused_here, monkeypatch):
    monkeypatch.setattr(FlowMatching, "earlier", Objective.earlier)
    error = refused_here("train_dit.py", "--config", recipe(alignment=SELF))
    assert "flow_matching does not: set alignment.teacher null" in error


@pytest.mark.slow
def test_two_processes_align_as_one(recipe, tmp_path):
    """With copies of the model and with parts of it, before and after the alignment stops."""
    config = recipe(
        train={"max_steps": 12, "save_every_steps": 12},
        optimizer={"learning_rate": 1e-4, "eps": 1e-5},
        alignment=SELF | {"stop_step": 8},
    )
    accelerate = str(Path(sys.executable).parent / "accelerate")
    launcher = (
        *(accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    )
    several = {"launcher": launcher, "ACCELERATE_USE_CPU": "true"}
    split = ("--train.sharding", "fsdp2", "--train.micro_batch", 2)
    for name, more, options in (("one", (), {}), ("copies", (), several), ("parts", split, several)):
        run(ROOT / "train_dit.py", "--config", config, "--output_dir", tmp_path / name, *more, **options)
    expected = read_checkpoint(tmp_path / "one", 12)
    for name in ("copies", "parts"):
        assert_equal(read_checkpoint(tmp_path / name, 12), expected, atol=1e-6, rtol=1e-4)
