"""What a config can turn on for memory, speed and health: each against the plain run."""

import json
import math
import os
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_equal, read_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from iwin_dit.build import budget, generator, trainer
from iwin_dit.build.budget import Budget
from iwin_dit.build.describe import describe_run
from iwin_dit.config.parse import load_config
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.training import checkpoints, loop, reports
from iwin_dit.training.ema import power_decay, power_gamma, reconstruct

SHORT = {"max_steps": 12, "save_every_steps": 6, "log_every_steps": 4}


def read_log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def trained(train_here, *arguments):
    code, output = train_here(*arguments)
    assert code == 0, output
    return output


# --- averages


def test_averages_are_those_of_the_weights_at_each_step(
    recipe, train_here, run_here, refused_here, tmp_path, monkeypatch
):
    """Every average against its definition, from the weights of each step; what a kill interrupts goes on."""
    config = recipe(
        train=SHORT,
        ema={"decays": [0.9, 0.5], "power_stds": [0.1, 0.2], "snapshot_every_steps": 4, "on_cpu": True},
    )
    weights = []
    real = loop.step_if_finite

    def step(optimizer, not_finite):
        real(optimizer, not_finite)
        weights.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(loop, "step_if_finite", step)
    trained(train_here, "--config", config)
    final = read_checkpoint(tmp_path / "run", 12)
    names = {f"{name}.safetensors" for name in ("ema", "ema_0.5", "ema_std_0.1", "ema_std_0.2")}
    written = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000012").iterdir()}
    assert names < written

    key = "blocks.0.mlp.down.weight"
    place = next(i for i, w in enumerate(weights[-1]) if torch.equal(w, final["model"][key]))
    start = trained_start(recipe)[key]
    for name, decay in (
        ("ema", lambda t: 0.9),
        ("ema_0.5", lambda t: 0.5),
        ("ema_std_0.1", lambda t: power_decay(t, power_gamma(0.1))),
        ("ema_std_0.2", lambda t: power_decay(t, power_gamma(0.2))),
    ):
        expected = start.double()
        for t, at_step in enumerate(weights, 1):
            expected = decay(t) * expected + (1 - decay(t)) * at_step[place].double()
        torch.testing.assert_close(final[name][key].double(), expected, atol=1e-6, rtol=0)

    snapshots = tmp_path / "run" / "snapshots"
    assert [checkpoint.step_of(path) for path in checkpoint.step_directories(snapshots)] == [4, 8, 12]
    again = reconstruct(snapshots, 0.1)
    torch.testing.assert_close(again[key], final["ema_std_0.1"][key], atol=1e-5, rtol=0)
    run_here(
        *("sample.py", "--checkpoint", tmp_path / "run", "--ema-std", 0.15, "--class", 0, "--steps", 2),
        *("--num-images", 1, "--out", tmp_path / "grid.png"),
    )
    assert json.loads((tmp_path / "grid.json").read_text())["ema_std"] == 0.15
    error = refused_here("sample.py", "--checkpoint", tmp_path / "run", "--ema-std", 0.4, "--class", 0)
    assert "found the relative standard deviation 0.4" in error

    # a run that goes on from step 6 makes the snapshots of steps 8 and 12 again, the same
    removed = tmp_path / "run" / "checkpoints" / "step-00000012"
    removed.rename(tmp_path / "last")
    trained(train_here, "--config", config)
    assert_equal(read_checkpoint(tmp_path / "run", 12), final)
    assert [checkpoint.step_of(path) for path in checkpoint.step_directories(snapshots)] == [4, 8, 12]


def trained_start(recipe):
    from iwin_dit.build.network import build_model

    return build_model(load_config(recipe("start.yaml"))).state_dict()


# --- memory


def test_levers_change_nothing_but_memory(recipe, train_here, tmp_path):
    config = recipe(train=SHORT)
    trained(train_here, "--config", config, "--output_dir", tmp_path / "plain")
    plain = read_checkpoint(tmp_path / "plain", 12)
    for name, arguments, exact in (
        ("all", ("--train.gradient_checkpointing", 1), True),
        ("second", ("--train.gradient_checkpointing", 2), True),
        ("cpu", ("--ema.on_cpu", "true"), True),
        ("math", ("--train.attention_backend", "math"), False),
        ("micro", ("--train.micro_batch", 2), False),
    ):
        trained(train_here, "--config", config, "--output_dir", tmp_path / name, *arguments)
        tolerance = {} if exact else {"atol": 2e-5, "rtol": 0}
        assert_equal(read_checkpoint(tmp_path / name, 12), plain, **tolerance)


def test_the_micro_batch_that_fits_is_found(recipe, train_here, tmp_path, monkeypatch):
    """A loss that runs out of memory above three images: of 8, micro-batches of 2 are taken."""
    real = FlowMatching.loss
    tried = []

    def loss(self, model, x0, *arguments):
        tried.append(len(x0))
        if len(x0) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, model, x0, *arguments)

    monkeypatch.setattr(FlowMatching, "loss", loss)
    output = trained(train_here, "--config", recipe(train={**SHORT, "micro_batch": "auto"}))
    assert "micro-batches of 2 images, 4 to a step" in output
    assert tried[:3] == [8, 4, 2]
    assert set(tried[3:]) == {2}
    assert len(tried[3:]) == 12 * 4

    def never(images):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(ConfigError, match="not even one image fits"):
        trainer.largest_that_fits(never, 6)
    with pytest.raises(RuntimeError, match="another"):
        trainer.largest_that_fits(lambda images: (_ for _ in ()).throw(RuntimeError("another")), 6)


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
def test_the_memory_of_activations_is_counted(recipe, checkpointing):
    """What the budget computes without memory, against what autograd really keeps, tensor by tensor."""
    from iwin_dit.build.network import build_model, build_objective

    config = load_config(recipe(train={"gradient_checkpointing": checkpointing}, model={"depth": 4}))
    model = build_model(config)
    for parameter in model.parameters():  # zeros at the start would be saved all the same
        assert parameter.requires_grad
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.checkpoint_every = checkpointing
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    shape = (8, 4, 8, 8)
    x, noise, u = torch.randn(shape), torch.randn(shape), torch.rand(8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        build_objective(config).loss(model, x, torch.zeros(8, dtype=torch.long), noise, u)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    computed = Budget(config).memory().activations
    if checkpointing:
        saved = Budget(config).activations
        computed -= 8 * saved.block  # of the one that is computed again, in the backward pass
    assert computed == pytest.approx(measured, rel=0.1)


def test_the_budget_of_the_authors_model():
    """The parts that are arithmetic: 712,475,552 parameters of four bytes."""
    config = load_config(budget.Path(__file__).parent.parent / "configs" / "iwin_xl_1_imagenet256.yaml")
    found = Budget(config).memory(num_processes=8)
    assert found.weights == found.gradients == found.ema == 4 * 712_475_552
    assert found.optimizer == 8 * 712_475_552
    assert budget.checkpoint_bytes(Budget(config).model, config) == 16 * 712_475_552
    assert Budget(config).disk_bytes == 16 * 712_475_552 * 3 + 4 * 712_475_552


def test_the_operations_of_the_authors_model():
    """Counted by hand: 256 tokens of width 1,152, windows of 64, kernels of 3 x 3, SwiGLU of 3 x 3,072."""
    config = load_config(budget.Path(__file__).parent.parent / "configs" / "iwin_xl_1_imagenet256.yaml")
    tokens, width, channels = 256, 1152, 32
    mixer = tokens * width * (4 * width + 2 * 64 + 9)
    mlp, modulation = tokens * width * 3 * 3072, 7 * width**2
    condition = 256 * width + width**2  # of the timestep
    ends = 2 * tokens * width * channels + 2 * width**2  # the patches, in and out, and the last modulation
    forward = 28 * (mixer + mlp + modulation) + condition + ends
    assert Budget(config).training_flops == 6 * forward  # two for each, forward; twice that backward


def test_tokens_of_clips_are_counted_along_all_axes(recipe):
    clips = recipe(model={"sample_frames": 6, "sample_size": [8, 4], "mixer": {"window_size": [3, 4, 2]}})
    assert "6 x 8 x 4 = 192, windows of 3 x 4 x 2" in describe_run(Budget(load_config(clips)))
    assert "8 x 8 = 64, windows of 4 x 4" in describe_run(Budget(load_config(recipe())))


def test_a_run_that_cannot_fit_is_refused(recipe, train_here, tmp_path, monkeypatch):
    config = recipe()
    monkeypatch.setattr("iwin_dit.runtime.files.free_bytes", lambda path: 1000)
    code, output = train_here("--config", config, "--dry-run")
    assert code == 2
    assert "disk " in output
    assert "the run writes" in output
    assert "1,000 bytes are free; lower train.keep_checkpoints" in output
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(budget, "device_bytes", lambda: ("a small card", 1 << 20))
    with pytest.raises(ConfigError, match=r"a small card has 1\.0 MiB; lower train\.micro_batch"):
        Budget(load_config(config)).check()


# --- speed


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for on the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_asks_the_device_only_for_the_log(recipe, train_here, tmp_path, monkeypatch):
    """As on a GPU, where reports are read a step later: none between two lines of the log."""
    monkeypatch.setattr(loop, "Reports", lambda accelerator: reports.Reports(accelerator, deferred=True))
    reads, at_step = Reads(), []
    real = reports.Reports.post

    def post(self, step, numbers):
        at_step.append(reads.count)
        return real(self, step, numbers)

    monkeypatch.setattr(reports.Reports, "post", post)
    with reads:
        train = {**SHORT, "log_every_steps": 6, "save_every_steps": 12, "num_workers": 1}
        trained(train_here, "--config", recipe(train=train))
    assert [b - a for a, b in pairwise(at_step[:6])] == [0] * 5
    assert [record["step"] for record in read_log(tmp_path / "run")] == [6, 12]


def test_training_alone_counts_as_time(recipe, train_here, tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and saving, snapshots, drawing and going back a hundred."""
    clock, steps = [0.0], []

    def taking(seconds, call):
        def timed(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return timed

    def loss(*arguments, real=FlowMatching.loss):
        steps.append(0)
        return real(*arguments) * (100 if len(steps) == 17 else 1)

    monkeypatch.setattr(FlowMatching, "loss", taking(1, loss))
    monkeypatch.setattr(
        reports, "time", SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    )
    for place, name in ((checkpoints, "save"), (loop, "save_snapshot"), (checkpoints.Spikes, "roll_back")):
        monkeypatch.setattr(place, name, taking(100, getattr(place, name)))
    monkeypatch.setattr(generator, "draw_preview", taking(100, lambda *_: None))
    config = recipe(
        train={"max_steps": 24, "save_every_steps": 6, "log_every_steps": 2, "spike_factor": 5.0}
        | {"sample_every_steps": 4},
        ema={"power_stds": [0.1], "snapshot_every_steps": 8},
    )
    flops = 8 * Budget(load_config(config)).training_flops
    monkeypatch.setattr(reports, "peak_flops", lambda device: 2 * flops)
    assert "back to step 12" in trained(train_here, "--config", config)
    assert clock[0] >= 1000 + len(steps), "the clock went on"
    for record in read_log(tmp_path / "run"):
        assert record["images_per_second"] == 8
        assert record["tflops_per_device"] == pytest.approx(flops / 1e12, rel=0.01)
        assert record["mfu"] == 0.5


@pytest.mark.parametrize(
    ("card", "teraflops"),
    [  # half of what the data sheets say, which is with sparsity
        ("NVIDIA H200", 1979 / 2),
        ("NVIDIA H200 NVL", 1671 / 2),
        ("NVIDIA GH200 480GB", 1979 / 2),
        ("NVIDIA H100 80GB HBM3", 1979 / 2),
        ("NVIDIA H100 NVL", 1671 / 2),
        ("NVIDIA H100 PCIe", 1513 / 2),
        ("NVIDIA A100-SXM4-80GB", 624 / 2),
        ("NVIDIA L40S", 733 / 2),
        ("NVIDIA GeForce RTX 4090", 330 / 2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_of_a_card_is_that_of_its_data_sheet(card, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    found = reports.peak_flops(torch.device("cuda"))
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12, rel=0.02))


def test_speed_and_size_are_in_the_log(recipe, train_here, tmp_path):
    config = recipe(train={**SHORT, "health_every_steps": 8})
    trained(train_here, "--config", config)
    first, second, last = read_log(tmp_path / "run")
    flops = Budget(load_config(config)).training_flops
    for record in (first, second, last):
        expected = record["images_per_second"] * flops / 1e12
        assert record["tflops_per_device"] == pytest.approx(expected, rel=0.02)
        assert "mfu" not in record, "a CPU has no peak"
    assert "weight_rms" not in first
    assert len(second["activation_rms"]) == len(second["weight_rms"]) == 2
    assert all(math.isfinite(x) and x > 0 for x in second["activation_rms"] + second["weight_rms"])
    with pytest.raises(ConfigError, match=r"no multiple of train\.log_every_steps"):
        load_config(recipe(train={**SHORT, "health_every_steps": 7}))


# --- health


def test_a_spike_goes_back_and_on_with_other_data(recipe, train_here, tmp_path, monkeypatch):
    """The loss is a hundred times as large in step 17: back to step 12, and its data are not seen again."""
    real, seen, calls = FlowMatching.loss, [], []

    def loss(self, model, x0, labels, noise, u):
        calls.append(0)
        seen.append(float(u[0]))
        return real(self, model, x0, labels, noise, u) * (100 if len(calls) == 17 else 1)

    monkeypatch.setattr(FlowMatching, "loss", loss)
    short = {"max_steps": 24, "save_every_steps": 12, "log_every_steps": 2}
    output = trained(train_here, "--config", recipe(train={**short, "spike_factor": 5.0}))
    assert "loss spike at step 18: back to step 12, and on with other data" in output
    assert len(set(seen)) == len(seen) == 18 + 12, "no data twice"
    assert [record["step"] for record in read_log(tmp_path / "run")] == list(range(2, 25, 2))
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000024")
    assert state == {"step": 24, "data_offset": 6}
    trained(train_here, "--config", recipe(train={**short, "spike_factor": 5.0, "max_steps": 28}))
    assert len(set(seen)) == len(seen) == 18 + 12 + 4, "nor after a resume"
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000028")
    assert state == {"step": 28, "data_offset": 6}


def test_a_spike_that_comes_back_stops_the_run(recipe, train_here, tmp_path, monkeypatch):
    real, calls = FlowMatching.loss, []

    def loss(*arguments):
        calls.append(0)
        return real(*arguments) * (100 if len(calls) > 15 else 1)

    monkeypatch.setattr(FlowMatching, "loss", loss)
    short = {"max_steps": 40, "save_every_steps": 12, "log_every_steps": 2}
    code, output = train_here("--config", recipe(train={**short, "spike_factor": 5.0}))
    assert code == 4
    assert output.count("back to step 12, and on with other data") == 3
    assert "after 3 times going back to step 12; lower optimizer.learning_rate" in output


# --- trackers


def test_trackers_hold_the_log_and_the_samples(recipe, train_here, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = recipe(train={**SHORT, "sample_every_steps": 12, "trackers": ["tensorboard", "wandb"]})
    trained(train_here, "--config", config)
    assert os.environ["WANDB_MODE"] == "offline"
    root = tmp_path / "run" / "trackers"
    events = EventAccumulator(str(root / "iwin-dit")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    for (step, value), record in zip(logged, read_log(tmp_path / "run"), strict=True):
        assert (step, value) == (record["step"], pytest.approx(record["loss"]))
    assert [event.step for event in events.Images("samples")] == [12]
    assert list(root.rglob("*.wandb"))


def test_trackers_go_on_where_the_run_does(recipe, train_here, tmp_path, monkeypatch):
    """The checkpoint of step 8 is lost: steps 6 and 8 come again, and are there once; wandb keeps its run."""
    begun = []
    monkeypatch.setattr("wandb.config", NoRun.config)
    monkeypatch.setattr("wandb.init", lambda **options: begun.append(options) or NoRun())
    config = recipe(train={**SHORT, "trackers": ["tensorboard", "wandb"], "log_every_steps": 2})
    code, output = train_here("--config", config, "--train.max_steps", 8, "--train.save_every_steps", 4)
    assert code == 0, output
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    trained(train_here, "--config", config)
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "iwin-dit")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    first, second = begun
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    (tmp_path / "run" / "trackers" / "wandb-id").write_text("../x")
    code, output = train_here("--config", config)
    assert code == 2
    assert "holds '../x', not an id of wandb; remove it" in output


class NoRun:
    """A run of wandb that keeps nothing."""

    config = SimpleNamespace(update=lambda *a, **k: None)

    def log(self, *arguments, **options):
        pass

    finish = log
