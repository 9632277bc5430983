"""Micro-batches: ``auto`` is measured as training computes, and a split model's sum stays split."""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, assert_equal, make_model, read_checkpoint, run
from PIL import Image
from torch.distributed.tensor import DTensor

from iwin_dit.build import budget, trainer
from iwin_dit.build import classifier as build_classifier
from iwin_dit.build.budget import Budget
from iwin_dit.build.describe import describe_run
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import load_config
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.layers import kernels
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.training import checkpoints, loop
from iwin_dit.training.sharding import shard
from iwin_dit.training.state import Run, State

AUTO = ("--train.micro_batch", "auto")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB"


@pytest.fixture
def classifier(tmp_path):
    """A recipe of two steps of twelve pictures, for a network of timm's with BatchNorm, which are mixed."""
    for split in ("train", "test"):
        for name in ("dark", "bright"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i).integers(0, 120, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels + 100 * (name == "bright")).save(folder / f"{i}.png")
    data = {"path": str(tmp_path / "train"), "held_out": str(tmp_path / "test"), "image_size": 16}
    train = {"max_steps": 2, "batch_images": 12, "precision": "fp32", "num_workers": 0}
    config = {
        **{"output_dir": str(tmp_path / "run"), "data": data, "ema": {"decays": [0.8]}},
        **{"model": {"name": "test_resnet", "num_classes": 2}},
        "train": train | {"sample_every_steps": 0, "evaluate_every_steps": 0},
    }
    path = tmp_path / "classifier.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def classify_here(script_here):
    return functools.partial(script_here, "train_classifier.py")


@pytest.mark.parametrize("script", ["train_dit.py", "train_classifier.py"])
def test_auto_is_measured_under_the_kernels_of_the_run(script, recipe, classifier, script_here, monkeypatch):
    """Every forward pass, the first of which measures, finds the attention and the kernels of the config."""
    is_dit, seen = script == "train_dit.py", []
    place, name = (FlowMatching, "loss") if is_dit else (build_classifier, "classification_loss")
    real = getattr(place, name)

    def watched(*arguments, **options):
        seen.append((kernels._selection, torch.backends.cuda.flash_sdp_enabled()))
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, watched)
    monkeypatch.setattr(kernels, "_selection", "auto")
    chosen = ("--train.kernels", "torch", "--train.attention_backend", "math", "--train.max_steps", 1)
    code, output = script_here(script, "--config", recipe() if is_dit else classifier, *AUTO, *chosen)
    assert code == 0, output
    assert seen == [("torch", False)] * 2


def test_auto_leaves_the_network_as_it_was(classifier, classify_here, tmp_path):
    """Statistics of BatchNorm among it: the run ends as the one that measures nothing."""
    for name, arguments in (("plain", ()), ("auto", AUTO)):
        code, output = classify_here("--config", classifier, "--output_dir", tmp_path / name, *arguments)
        assert code == 0, output
    assert "micro-batches of 12 images, 1 to a step" in output
    plain, auto = (read_checkpoint(tmp_path / name, 2) for name in ("plain", "auto"))
    assert any("running_mean" in name for name in plain["model"])
    assert_equal(auto, plain)


def test_auto_takes_pairs_where_images_are_mixed(classifier, classify_here, monkeypatch):
    """Memory for three images: of 12, micro-batches of 2 where 3 divides too; without mixing 3."""
    real = build_classifier.classification_loss

    def loss(model, images, *arguments, **options):
        if len(images) > 3:
            raise RuntimeError(OUT_OF_MEMORY)
        return real(model, images, *arguments, **options)

    monkeypatch.setattr(build_classifier, "classification_loss", loss)
    code, output = classify_here("--config", classifier, *AUTO)
    assert code == 0, output
    assert "micro-batches of 2 images, 6 to a step" in output
    unmixed = ("--augment.mixup", 0, "--augment.cutmix", 0, "--output_dir", classifier.parent / "unmixed")
    code, output = classify_here("--config", classifier, *AUTO, *unmixed)
    assert code == 0, output
    assert "micro-batches of 3 images, 4 to a step" in output


@pytest.mark.slow
def test_auto_leaves_no_graph_of_any_size(recipe):
    """Memory for two images: eight, four and two are tried, and each compiled graph is of one size alone."""
    config = load_config(recipe(train={"micro_batch": "auto", "compile": True}))
    model, sizes = make_model(num_layers=1).train(), []

    def backend(graph, inputs):
        tokens = [value for value in inputs if isinstance(value, torch.Tensor) and value.ndim == 4]
        sizes.append(tokens[0].shape[0])
        return graph.forward

    def loss(model, x0):
        value = model(x0, torch.rand(len(x0)), torch.zeros(len(x0), dtype=torch.long)).sample.sum()
        if len(x0) > 2:
            raise RuntimeError(OUT_OF_MEMORY)
        return value

    model.blocks[0].compile(backend=backend)
    alone = SimpleNamespace(
        **{"num_processes": 1, "is_main_process": False, "device": torch.device("cpu")},
        **{"autocast": contextlib.nullcontext, "gather": lambda tensor: tensor},
    )
    run = Run(config, alone, None, State(model, {}, torch.optim.SGD(model.parameters())))
    task = SimpleNamespace(
        **{"loss": loss, "random_batch": lambda n: (torch.randn(n, 4, 8, 8),)},
        **{"in_pairs": False, "begin_step": lambda state, step: None},
    )
    assert trainer.find_micro_batch(run, task) == 2
    loss(model, torch.randn(2, 4, 8, 8))
    assert sizes == [8, 4, 2], "the last one serves training"
    assert {type(size) for size in sizes} == {int}, "a symbol would stand for any size"


def test_an_odd_share_of_a_process_is_refused(classifier):
    """Twelve images on four processes: nothing is measured, since no micro-batch joins three two by two."""
    text = classifier.read_text().replace("train:", "train:\n  micro_batch: auto")
    classifier.write_text(text)
    config = load_config(classifier, ClassifierConfig)
    four = Run(config, SimpleNamespace(num_processes=4), None, None)
    with pytest.raises(ConfigError, match="micro-batches of 3 images cannot be joined two by two"):
        trainer.find_micro_batch(four, SimpleNamespace(in_pairs=True))


def test_the_budget_of_auto_is_that_of_one_image(recipe, monkeypatch):
    """What may be split is not refused; what one image does not fit is."""
    auto, one, whole = (load_config(recipe(train={"micro_batch": size})) for size in ("auto", 1, 8))
    least, most = Budget(one).memory().total, Budget(whole).memory().total
    assert least < most
    assert f"or down to {budget.in_units(least)} with smaller micro-batches" in describe_run(Budget(auto))
    assert "down to" not in describe_run(Budget(whole))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(budget, "device_bytes", lambda: ("a card", least))
    Budget(auto).check()
    with pytest.raises(ConfigError, match=r"lower train\.micro_batch, or set"):
        Budget(whole).check()
    monkeypatch.setattr(budget, "device_bytes", lambda: ("a card", least - 1))
    with pytest.raises(ConfigError, match=r"; set train\.gradient_checkpointing"):
        Budget(auto).check()


def test_a_split_model_keeps_its_part_of_the_gradients_alone(tmp_path):
    """After each micro-batch; their sum is the gradient of the batch. A group of one process splits, too."""
    plain, split = make_model().train(), make_model().train()
    x, noise = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8)
    labels, u = torch.arange(8) % 3, torch.rand(8)
    FlowMatching().loss(plain, x, labels, noise, u).sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        shard(split, "cpu", num_processes=1)
        for micro, batch in enumerate(zip(*(t.split(2) for t in (x, labels, noise, u)), strict=True)):
            with loop.synchronize(None, split, split, now=micro == 3):
                FlowMatching().loss(split, *batch).sum().backward()
            assert all(isinstance(parameter.grad, DTensor) for parameter in split.parameters())
        for (name, found), expected in zip(split.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(
                found.grad.full_tensor(), expected.grad, msg=lambda m, name=name: f"{name}: {m}"
            )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_that_share_a_model_add_up(recipe, tmp_path):
    """Two micro-batches on each of two processes, split over them, against one process and one batch."""
    config = recipe(
        train={"max_steps": 20, "save_every_steps": 20},
        optimizer={"learning_rate": 1e-4, "eps": 1e-5},
    )
    accelerate = str(Path(sys.executable).parent / "accelerate")
    launcher = (
        *(accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    )
    for name, options in (
        ("one", {}),
        ("split", {"launcher": launcher, "ACCELERATE_USE_CPU": "true"}),
    ):
        more = ("--train.sharding", "fsdp2", "--train.micro_batch", 2) if name == "split" else ()
        run(ROOT / "train_dit.py", "--config", config, "--output_dir", tmp_path / name, *more, **options)
    one, split = (read_checkpoint(tmp_path / name, 20) for name in ("one", "split"))
    assert_equal(split, one, atol=1e-6, rtol=1e-4)


def test_each_thing_of_a_step_is_done_when_it_is_due(recipe, train_here, tmp_path, monkeypatch):
    """Gradients are averaged with the last of four micro-batches. Weights are compared after each second step
    and before a checkpoint. Dropout is seeded for each micro-batch. Nothing is drawn.
    """
    averaged, compared, seeded = [], [], []
    synchronize, seed_dropout = loop.synchronize, loop.seed_dropout
    monkeypatch.setattr(loop, "synchronize", lambda *a, now: averaged.append(now) or synchronize(*a, now))
    monkeypatch.setattr(loop, "seed_dropout", lambda *a: seeded.append(a) or seed_dropout(*a))
    monkeypatch.setattr(loop, "check_weights", lambda accelerator, state, step: compared.append(step))
    monkeypatch.setattr(checkpoints, "check_weights", lambda *a: compared.append(f"saved {a[2]}"))
    bars, progress = [], loop.progress

    def shown(**options):
        bars.append(progress(**options))
        return bars[-1]

    monkeypatch.setattr(loop, "progress", shown)
    options = {"max_steps": 5, "micro_batch": 2, "compare_weights_every_steps": 2}
    code, output = train_here("--config", recipe(train=options))
    assert code == 0, output
    assert [bar.n for bar in bars] == [5]
    assert averaged == [False, False, False, True] * 5
    assert compared == [2, 4, "saved 5"]
    assert seeded == [(0, step, 0, micro) for step in range(5) for micro in range(4)]
    assert not list((tmp_path / "run" / "samples").iterdir())
