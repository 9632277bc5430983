"""Faults while training: signals, numbers that are not finite, disks, workers, closed pipes (rows 8 to 16,
36, 38, 39, 42 and 44)."""

import errno
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, assert_equal, logged_steps, read_checkpoint, start, wait_for_step
from PIL import Image

from iwin_dit.build import generator, pipeline, trainer
from iwin_dit.build.classifier import held_out_loader
from iwin_dit.commands import train
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.common import TrainConfig
from iwin_dit.config.parse import load_config
from iwin_dit.data.latents import LatentDataset
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.runtime import checkpoint, files
from iwin_dit.runtime.errors import ConfigError, WorkerError
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.processes import worker_errors
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.runtime.signals import ASKING, AT_ONCE, StopRequest
from iwin_dit.training import checkpoints, loop, reports

SHORT = {"max_steps": 12, "save_every_steps": 5, "log_every_steps": 4}


def steps_on_disk(run):
    return [checkpoint.step_of(path) for path in checkpoint.step_directories(run / "checkpoints")]


def patched(code, *arguments, **options):
    """The script in a process of its own, after ``code``."""
    program = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
    program += f"sys.argv = {[str(a) for a in arguments]!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return start("-c", program, **options)


def call_at(monkeypatch, owner, name, number, action):
    """Before the call ``number`` of ``owner.name``, counted from 1, ``action()`` happens."""
    real, counter = getattr(owner, name), itertools.count(1)

    def wrapper(*args, **kwargs):
        if next(counter) == number:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def call_always(monkeypatch, owner, name, action):
    """Before each call of ``owner.name``, ``action()`` happens."""
    real = getattr(owner, name)

    def wrapper(*args, **kwargs):
        action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.fixture(scope="module")
def whole(latents_folder, tmp_path_factory):
    """The last checkpoint of the short run, undisturbed; made by the first test that asks."""
    return {}


def undisturbed(whole, train_here, config, directory):
    if not whole:
        code, output = train_here("--config", config, "--output_dir", directory)
        assert code == 0, output
        whole.update(read_checkpoint(directory, 12))
    return whole


# --- row 8: the disk is full while logging


def test_a_log_that_cannot_be_written_stops_after_a_checkpoint(recipe, train_here, tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    call_at(monkeypatch, RunDirectory, "log", 2, full)
    code, output = train_here("--config", recipe(train=SHORT))
    assert code == 3
    assert output.count("error: ") == 1
    assert "the log cannot be written" in output
    assert "Traceback" not in output
    assert steps_on_disk(tmp_path / "run")[-1] == 8


def test_a_disk_that_is_full_while_drawing_is_one_line(recipe, train_here, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    monkeypatch.setattr(Image.Image, "save", full)
    code, output = train_here("--config", recipe(train={**SHORT, "sample_every_steps": 6}))
    assert code == 3
    assert "error: the samples cannot be written: No space left on device: x.png; make room" in output
    assert "Traceback" not in output
    assert steps_on_disk(tmp_path / "run") == [5, 6]


# --- row 9: the output cannot be written


def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    stop = "import importlib.abc\n" + "\n".join(
        (
            "class NoTorch(importlib.abc.MetaPathFinder):",
            "    def find_spec(self, name, path=None, target=None):",
            "        assert name != 'torch', 'torch is loaded'",
            "sys.meta_path.insert(0, NoTorch())",
        )
    )
    process = patched(stop, "train_dit.py", "--config", recipe(), "--output_dir", tmp_path / "file" / "run")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert "cannot be written" in stderr
    assert "torch is loaded" not in stderr


def test_files_and_folders_with_dots_in_their_names(tmp_path):
    folder, file = tmp_path / "lr0.001", tmp_path / "x.png"
    folder.mkdir()
    file.write_text("")

    def is_writable(path, is_file):
        try:
            files.check_writable(path, "--out", is_file)
        except ConfigError:
            return False
        return True

    assert [is_writable(p, False) for p in (folder, file, tmp_path / "v1.5")] == [True, False, True]
    assert [is_writable(p, True) for p in (folder, file, tmp_path / "y.png")] == [False, True, True]
    assert not is_writable(file / "y.png", True)
    assert not is_writable(file / "run", False)


# --- row 10: two runs in one directory


def test_a_second_run_in_the_same_directory_is_refused(recipe, train_here, tmp_path):
    """It changes nothing. Once the first is killed the directory is free, though its worker lives on."""
    config, folder = recipe(train=SHORT), tmp_path / "run"
    folder.mkdir()
    reader, writer = os.pipe()
    first = os.fork()
    if not first:
        lock = hold(folder)
        if worker := os.fork():
            os.write(writer, str(worker).encode())
        time.sleep(60)
        os._exit(lock.fileno())
    worker = int(os.read(reader, 20))
    try:
        before = (folder / "lock").read_text()
        code, output = train_here("--config", config)
        assert code == 2
        assert f"is in use, held by pid {first} on host" in output
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["lock"]
        assert (folder / "lock").read_text() == before
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    code, output = train_here("--config", config)
    os.kill(worker, signal.SIGKILL)
    assert code == 0, output


# --- rows 11, 13 and 14: signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_at_a_step_and_the_next_run_goes_on(
    recipe, train_here, tmp_path, monkeypatch, whole, number
):
    config = recipe(train=SHORT)
    expected = undisturbed(whole, train_here, config, tmp_path / "whole")
    signal.signal(number, signal.default_int_handler)  # which a shell may have set to be ignored
    with monkeypatch.context() as patch:
        call_at(patch, FlowMatching, "loss", 7, lambda: os.kill(os.getpid(), number))
        code, output = train_here("--config", config)
    assert code == 143
    assert "stopped at step 7 with a checkpoint" in output
    assert steps_on_disk(tmp_path / "run") == [5, 7]
    code, output = train_here("--config", config)
    assert code == 0, output
    assert_equal(read_checkpoint(tmp_path / "run", 12), expected)


def test_a_signal_while_saving_lets_the_checkpoint_be_finished(recipe, train_here, tmp_path, monkeypatch):
    call_at(monkeypatch, files, "write", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    config = recipe(train={**SHORT, "save_every_steps": 1})
    code, output = train_here("--config", config)
    assert code == 143, output
    for path in checkpoint.step_directories(tmp_path / "run" / "checkpoints"):
        checkpoint.verify(path)
    assert steps_on_disk(tmp_path / "run")[0] == 1


def test_a_signal_while_drawing_stops_between_batches(recipe, train_here, tmp_path, monkeypatch):
    call_at(
        monkeypatch,
        pipeline.IwinDiTPipeline,
        "__call__",
        1,
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    code, output = train_here("--config", recipe(train={**SHORT, "sample_every_steps": 4}))
    assert code == 143, output
    assert not list((tmp_path / "run" / "samples").iterdir())
    assert steps_on_disk(tmp_path / "run") == [5]


def test_a_signal_at_start_ends_without_a_checkpoint(recipe, tmp_path):
    slow = "\n".join(
        (
            "import time, iwin_dit.build.data as build",
            "build.build_dataset = lambda *a: print('here', flush=True) or time.sleep(60)",
        )
    )
    process = patched(slow, "train_dit.py", "--config", recipe())
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM, stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_to_the_group_leaves_the_workers_alone(recipe, tmp_path):
    """As of Ctrl-C on a terminal, and as launchers send it: to all processes of the group."""
    config = recipe(train={**SHORT, "max_steps": 100_000, "num_workers": 2})
    process = start("train_dit.py", "--config", config, start_new_session=True)
    wait_for_step(process, tmp_path / "run", 8)
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    step = int(stdout.split("stopped at step ")[1].split()[0])
    assert steps_on_disk(tmp_path / "run")[-1] == step


@pytest.mark.slow
def test_a_second_signal_stops_at_once(recipe, tmp_path):
    slow = "\n".join(
        (
            "import time",
            "from iwin_dit.diffusion.flow_matching import FlowMatching",
            "real, calls = FlowMatching.loss, []",
            "def loss(*a):",
            "    calls.append(0)",
            "    if len(calls) == 7:",
            "        print('here', flush=True)",
            "        time.sleep(60)",
            "    return real(*a)",
            "FlowMatching.loss = loss",
        )
    )
    process = patched(slow, "train_dit.py", "--config", recipe(train=SHORT))
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None, "the first waits for the step"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM, stderr
    assert steps_on_disk(tmp_path / "run") == [5]
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-00000005")


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (*AT_ONCE, *ASKING)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_a_terminal_or_a_scheduler_may_ask_more_than_once(handlers, number):
    """A launcher passes on the SIGHUP that the terminal has sent to all; a second SIGTERM still ends."""
    stop = StopRequest()
    assert not stop
    for _ in range(3):
        os.kill(os.getpid(), number)
        assert stop
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the next one stops at once"


def test_signals_are_given_back_after_training(recipe, handlers, monkeypatch):
    """What goes on in the same process, as an evaluation, is stopped by the first of them."""
    found = []
    finish = generator.Generator.finish
    monkeypatch.setattr(
        generator.Generator,
        "finish",
        lambda *a: found.append(signal.getsignal(signal.SIGINT)) or finish(*a),
    )
    train.train(load_config(recipe(train={**SHORT, "max_steps": 1})))
    assert found[0] != signal.SIG_DFL, "the export is not cut short"
    assert {signal.getsignal(number) for number in (*AT_ONCE, *ASKING)} == {signal.SIG_DFL}
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_signal_that_was_ignored_stays_ignored(handlers):
    """As nohup makes it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_training_in_a_thread_has_no_handlers(recipe, tmp_path, capfd, handlers):
    config, found = load_config(recipe(train={**SHORT, "max_steps": 2})), []
    thread = threading.Thread(target=lambda: found.append(train.train(config)))
    thread.start()
    thread.join(timeout=120)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found == [0]
    assert capfd.readouterr().out.count("no signal stops it") == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_terminal_that_is_closed_costs_no_step(recipe, tmp_path):
    """The system sends SIGHUP to all processes of the terminal; writing to it is an error from then on."""
    config = recipe(train={**SHORT, "max_steps": 100_000, "save_every_steps": 100_000, "num_workers": 1})
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "train_dit.py", "--config", str(config)])
    deadline = time.time() + 240
    while max(logged_steps(tmp_path / "run"), default=0) < 8:
        assert time.time() < deadline
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    os.waitpid(pid, 0)
    (step,) = steps_on_disk(tmp_path / "run")
    assert step >= 8
    checkpoint.verify(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")


# --- a checkpoint by the clock


@pytest.mark.parametrize("spike_factor", [None, 100.0])
def test_a_checkpoint_comes_by_the_clock(recipe, train_here, tmp_path, monkeypatch, whole, spike_factor):
    """A minute passes in each step, and five make a checkpoint; one to go back to comes with a log line."""
    config = recipe(train=SHORT)
    expected = undisturbed(whole, train_here, config, tmp_path / "whole")
    minutes, saved = [0], []
    call_always(monkeypatch, FlowMatching, "loss", lambda: minutes.append(minutes[-1] + 1))
    call_always(monkeypatch, checkpoints, "save", lambda: saved.append(minutes[-1]))
    monkeypatch.setattr(reports.time, "monotonic", lambda: 60.0 * minutes[-1])
    timed = {**SHORT, "save_every_steps": 12, "save_every_minutes": 5, "spike_factor": spike_factor}
    code, output = train_here("--config", recipe(train=timed), "--train.keep_checkpoints", 9)
    assert code == 0, output
    assert saved == ([5, 10, 12] if spike_factor is None else [8, 12])
    assert steps_on_disk(tmp_path / "run") == saved
    assert_equal(read_checkpoint(tmp_path / "run", 12), expected)


# --- rows 15 and 16: numbers that are not finite


class NaNGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def spoil(monkeypatch, kind, calls):
    """The loss, or only its gradient, is not finite in these calls."""
    real, counter = FlowMatching.loss, itertools.count(1)

    def loss(self, *arguments):
        value = real(self, *arguments)
        if next(counter) not in calls:
            return value
        return value * torch.nan if kind == "loss" else NaNGradient.apply(value)

    monkeypatch.setattr(FlowMatching, "loss", loss)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(
    recipe, train_here, tmp_path, monkeypatch, kind, deferred
):
    """On a GPU the host learns of it a step later: then too, no bad step has changed anything."""
    spoil(monkeypatch, kind, {7})
    taken = []
    real = loop.step_if_finite

    def step(optimizer, not_finite):
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        real(optimizer, not_finite)
        after = [p for group in optimizer.param_groups for p in group["params"]]
        taken.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    monkeypatch.setattr(loop, "step_if_finite", step)
    if deferred:
        monkeypatch.setattr(loop, "Reports", lambda accelerator: reports.Reports(accelerator, deferred=True))
    code, output = train_here("--config", recipe(train={**SHORT, "log_every_steps": 12}))
    assert code == 4, output
    assert "diverged at step 7" in output
    assert ("loss nan" in output) == (kind == "loss")
    assert "gradient norm nan" in output
    assert taken[:6] == [True] * 6
    assert taken[6] is False
    assert len(taken) == (8 if deferred else 7)
    assert steps_on_disk(tmp_path / "run") == [5]


def test_steps_that_are_not_finite_can_be_skipped(recipe, train_here, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, "loss", {3, 4, 9})
        config = recipe(train={**SHORT, "on_nonfinite": "skip", "max_skipped_steps": 2})
        code, output = train_here("--config", config)
    assert code == 0, output
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in log] == [2, 2, 3]
    assert all(record["loss"] > 0 for record in log)
    final = read_checkpoint(tmp_path / "run", 12)
    assert {float(v) for k, v in final["optimizer"].items() if k.endswith("/step")} == {9.0}

    spoil(monkeypatch, "loss", {3, 4, 5})
    code, output = train_here("--config", config, "--output_dir", tmp_path / "other")
    assert code == 4
    assert "3 steps in a row" in output


# --- row 36: a worker dies or hangs


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (
            lambda: os._exit(1),
            r"DataLoader worker (\(pid.*\d+\) exited unexpectedly|is gone).*lower train.num_workers",
        ),
        (lambda: time.sleep(60), "DataLoader timed out after 3 seconds.*raise train.worker_timeout_seconds"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_named(recipe, train_here, tmp_path, monkeypatch, happens, message):
    call_at(monkeypatch, LatentDataset, "draw", 9, happens)
    began = time.time()
    config = recipe(train={**SHORT, "num_workers": 1, "worker_timeout_seconds": 3})
    code, output = train_here("--config", config)
    assert code == 5, output
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert re.search(message, error), error
    assert time.time() - began < 50
    steps = steps_on_disk(tmp_path / "run")
    assert steps[0] == 5
    if "timed out" in message:  # a death is noticed sooner, also in the middle of a step, which is not saved
        assert steps == [5, 8]


class Hangs(torch.utils.data.Dataset):
    """Images that are never read."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        time.sleep(60)


def test_held_out_images_that_hang_are_an_error():
    train = TrainConfig(num_workers=1, worker_timeout_seconds=1)
    loader = held_out_loader(
        ClassifierConfig(train=train), Hangs(), SimpleNamespace(device=torch.device("cpu"))
    )
    with pytest.raises(WorkerError, match="timed out after 1 seconds"), worker_errors():
        next(iter(loader))


# --- row 38: the clock


def test_nothing_depends_on_the_clock(recipe, train_here, tmp_path, monkeypatch, whole):
    config = recipe(train=SHORT)
    expected = undisturbed(whole, train_here, config, tmp_path / "whole")
    clock = itertools.count(2e9, -1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    code, output = train_here("--config", config)
    assert code == 0, output
    assert_equal(read_checkpoint(tmp_path / "run", 12), expected)


# --- row 39: nobody reads the output


def test_a_closed_pipe_does_not_stop_training(recipe, tmp_path):
    command = f"'{sys.executable}' train_dit.py --config '{recipe(train=SHORT)}' 2>&1 | true"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, timeout=120)
    assert logged_steps(tmp_path / "run") == [4, 8, 12]
    assert steps_on_disk(tmp_path / "run")[-1] == 12
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


# --- row 42: names of compiled models


def test_a_compiled_model_is_saved_under_its_plain_names(recipe, train_here, tmp_path, monkeypatch, whole):
    config = recipe(train=SHORT)
    expected = undisturbed(whole, train_here, config, tmp_path / "whole")
    real = torch.nn.Module.compile
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or real(self, backend="eager")
    )
    code, output = train_here("--config", config, "--train.compile", "true")
    assert code == 0, output
    assert len(compiled) == 2, "each block"
    assert_equal(read_checkpoint(tmp_path / "run", 12), expected, atol=1e-6, rtol=0)


# --- row 44: what the device cannot do


def test_a_precision_that_the_device_lacks_is_refused(recipe, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_computes_bf16", lambda device: False)
    code, output = train_here("--config", recipe(train={**SHORT, "precision": "bf16"}))
    assert code == 2
    assert "does not compute in bf16; set train.precision fp32" in output
    assert not (tmp_path / "run").exists()
