"""What the loop is told of each step: reports, lines of the log, spikes, the health of blocks."""

import contextlib
import errno
import math
import os
import signal
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from iwin_dit.build import trainer
from iwin_dit.runtime.errors import NonFiniteError, StorageError, WorkerError
from iwin_dit.runtime.processes import worker_errors
from iwin_dit.training import loop, reports
from iwin_dit.training.checkpoints import Checkpoints, is_spike
from iwin_dit.training.reports import Alarm, Meter, Report, Reports, due, watch_blocks, weight_rms
from iwin_dit.training.state import Progress


def accelerator(processes=1):
    """Of several processes that all have the same numbers."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=processes,
        reduce=lambda tensor, reduction: tensor * processes if reduction == "sum" else None,
    )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("loss", "norm"), [(2.0, 3.0), (math.nan, 3.0), (2.0, math.inf), (-math.inf, 3.0)])
@pytest.mark.parametrize("stop", [False, True])
def test_a_report_is_of_all_processes(processes, loss, norm, stop):
    sent = Reports(accelerator(processes))
    numbers = sent.combine(torch.tensor(loss), torch.tensor(norm, dtype=torch.float64), stop)
    (report,) = sent.post(7, numbers)
    assert report.step == 7
    assert report[1:3] == pytest.approx((loss * processes, norm), nan_ok=True)
    assert report.finite == (math.isfinite(loss) and math.isfinite(norm))
    assert report.stop == stop
    assert sent.flush() == []


def test_deferred_reports_are_read_one_step_later():
    """Each once, in their order; the default on a CPU is at once."""
    sent = Reports(accelerator(), deferred=True)
    numbers = [torch.tensor([float(i), 0, 0, 0, 0]) for i in range(5)]
    arrived = [[report.step for report in sent.post(i, numbers[i])] for i in range(5)]
    assert arrived == [[], [0], [1], [2], [3]]
    assert [(report.step, report.loss) for report in sent.flush()] == [(4, 4.0)]
    assert sent.flush() == []
    assert not Reports(accelerator()).deferred
    assert Reports(SimpleNamespace(device=torch.device("cuda"))).deferred


@pytest.mark.parametrize(("stop", "save"), [(False, True), (True, False), (True, True), (False, False)])
def test_what_one_process_asks_for_is_done_by_all(stop, save):
    """Of four processes, one asks."""
    own = accelerator(4)
    own.reduce = lambda tensor, reduction: tensor * torch.tensor([4.0, 1, 1])
    sent = Reports(own)
    (report,) = sent.post(3, sent.combine(torch.tensor(0.5), torch.tensor(1.0), stop, save))
    assert (report.loss, report.stop, report.save) == (2.0, stop, save)


def test_numbers_of_a_device_are_read_when_they_have_arrived():
    done = []
    event = SimpleNamespace(synchronize=lambda: done.append("arrived"))
    numbers = SimpleNamespace(tolist=lambda: done.append("read") or [1.0, 2.0, 0.0, 0.0, 0.0])
    sent = Reports(accelerator(), deferred=True)
    sent._waiting.append((1, numbers, event))
    assert sent.flush() == [Report(1, 1.0, 2.0, finite=True, stop=False, save=False)]
    assert done == ["arrived", "read"]


def test_an_alarm_rings_after_its_minutes_until_it_is_set_again(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: now[0]))
    alarm, never = Alarm(2), Alarm(0)
    for seconds, rings in ((0, False), (119.9, False), (120, True), (500, True)):
        now[0] = 50 + seconds
        assert bool(alarm) == rings
        assert not never
    alarm.set()
    assert not alarm
    now[0] += 120
    assert alarm


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reports, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def good(step, loss=1.0, norm=2.0):
    return Report(step, loss, norm, finite=True, stop=False)


def bad(step):
    return Report(step, math.nan, math.inf, finite=False, stop=False)


def test_a_line_of_the_log_is_of_the_steps_since_the_last(clock):
    meter = Meter(accelerator(2), batch_images=6, flops_per_image=1e12, max_skipped=2)
    for step, loss in ((1, 3.0), (2, 5.0), (3, 1.0)):
        clock[0] += 2
        meter.add(good(step, loss, norm=step))
    with meter.paused():
        clock[0] += 50
    record = meter.record(3, 0.5)
    assert record == {
        "step": 3,
        "loss": 3.0,
        "grad_norm": 3,
        "learning_rate": 0.5,
        "images_per_second": 3.0,  # 18 images in six seconds
        "tflops_per_device": 1.5,  # of which each device does half
    }
    clock[0] += 1
    meter.add(good(4, 7.0))
    again = meter.record(4, 0.25)
    assert (again["loss"], again["images_per_second"]) == (7.0, 6.0)


def test_skipped_steps_are_counted_and_those_in_a_row_are_limited(clock):
    meter = Meter(accelerator(), batch_images=1, flops_per_image=1.0, max_skipped=2)
    for step, finite in enumerate((False, False, True, False, False), 1):
        meter.add(good(step, loss=step) if finite else bad(step))
    clock[0] += 1
    record = meter.record(5, 0.1)
    assert record["skipped_steps"] == 4
    assert record["loss"] == 3, "of the steps that were taken"
    assert record["grad_norm"] is None
    with pytest.raises(
        NonFiniteError, match=r"diverged at step 6: loss nan, gradient norm inf, 3 steps in a row"
    ):
        meter.add(bad(6))
    clock[0] += 1
    assert meter.record(6, 0.1)["loss"] is None
    strict = Meter(accelerator(), batch_images=1, flops_per_image=1.0, max_skipped=0)
    with pytest.raises(NonFiniteError, match="norm inf; the step was not taken"):
        strict.add(bad(1))


def test_a_spike_is_far_above_the_median_of_the_last_twenty():
    assert is_spike(2.1, [1.0] * 5, 2.0)
    assert not is_spike(2.0, [1.0] * 5, 2.0), "above, not at"
    assert not is_spike(9.0, [1.0] * 4, 2.0), "too few to tell"
    assert not is_spike(9.0, [1.0, None, 1.0, 1.0, 1.0], 2.0)
    assert not is_spike(9.0, [1.0] * 9, None)
    assert not is_spike(None, [1.0] * 9, 2.0)
    assert not is_spike(9.0, [1.0] * 11 + [5.0] * 20, 2.0), "only the last twenty count"
    assert is_spike(9.0, [5.0] * 11 + [1.0] * 20, 2.0)
    assert is_spike(9.0, [5.0] * 9 + [1.0] * 11, 2.0), "all twenty count"
    assert not is_spike(9.0, [1.0] * 9 + [5.0] * 11, 2.0)
    assert is_spike(2.1, [1.0, 1.0, 1.0, 50.0, 1.0], 2.0), "the median, not the mean"


def test_something_is_due_every_so_many_steps():
    assert [step for step in range(10) if due(step, 3)] == [0, 3, 6, 9]
    assert [step for step in range(3) if due(step, 1)] == [0, 1, 2]
    assert not any(due(step, 0) for step in range(3))


class Stages(nn.Module):
    """Two stages of blocks, as the hierarchical model has them; a block adds what its name says."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList([block()])}) for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for stage in self.stages:
            for block in stage["blocks"]:
                x = block(x)
        return self.head(x)


def block():
    return nn.Linear(4, 4)


def test_the_health_of_blocks_is_that_of_their_outputs_and_weights():
    torch.manual_seed(0)
    model, x = Stages(), torch.randn(3, 4)
    with watch_blocks(model, active=True) as health:
        model(torch.zeros(3, 4))  # only the last micro-batch counts
        model(x)
    outputs, squares = [], []
    for stage in model.stages:
        x = stage["blocks"][0](x).detach()
        outputs.append(float((x**2).mean() ** 0.5))
        numbers = torch.cat([p.detach().flatten() for p in stage["blocks"][0].parameters()])
        squares.append(float((numbers**2).mean() ** 0.5))
    assert health["activation_rms"].tolist() == pytest.approx(outputs)
    assert weight_rms(model).tolist() == pytest.approx(squares)
    assert not any(module._forward_hooks for module in model.modules()), "no hook stays"
    with watch_blocks(model, active=False) as health:
        assert not any(module._forward_hooks for module in model.modules())
        model(x)
    assert health == {}
    with pytest.raises(KeyError), watch_blocks(model, active=True):
        raise KeyError("of the loop")
    assert not any(module._forward_hooks for module in model.modules()), "nor after an error"


@pytest.mark.parametrize(("most", "fits"), [(6, 3), (12, 5), (7, 6), (1, 1)])
def test_the_largest_divisor_that_fits_is_tried_first(most, fits):
    tried = []

    def attempt(images):
        tried.append(images)
        if images > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    divisors = [images for images in range(most, 0, -1) if most % images == 0]
    expected = next(images for images in divisors if images <= fits)
    assert trainer.largest_that_fits(attempt, most) == expected
    assert tried == divisors[: divisors.index(expected) + 1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"),
            r"pid 7.*Killed.*; it was killed",
        ),
        (
            RuntimeError("DataLoader timed out after 9 seconds\nmore"),
            "9 seconds.*; the disk hangs, or is too slow",
        ),
        (ConnectionResetError("reset"), "a DataLoader worker is gone; it was killed, often for memory"),
        (ConnectionRefusedError("refused"), "a DataLoader worker is gone"),
        (EOFError(), "a DataLoader worker is gone"),
    ],
)
def test_a_worker_that_dies_is_an_error_of_its_own(error, message):
    with pytest.raises(WorkerError, match=message) as caught, worker_errors():
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_signal_of_a_workers_death_may_come_after_its_lost_connection():
    """PyTorch makes an error of SIGCHLD wherever the process is, so also while the first error is handled."""

    def died(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, died)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(WorkerError, match="a DataLoader worker is gone; it was killed"), worker_errors():
            raise ConnectionResetError("reset")
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("x")])
def test_other_errors_are_not_the_workers(error):
    with pytest.raises(type(error)) as caught, worker_errors():
        raise error
    assert caught.value is error


class Split(nn.Linear):
    """Stands for a model that is split over the processes."""


@pytest.fixture
def split(monkeypatch):
    monkeypatch.setattr(loop, "FSDPModule", Split)
    return Split(2, 2).eval()


def test_gradients_are_averaged_once_for_a_step_but_each_time_for_a_split_model(split):
    several = SimpleNamespace(no_sync=lambda prepared: ("later", prepared))
    plain = nn.Linear(2, 2)
    assert loop.synchronize(several, plain, "prepared", now=False) == ("later", "prepared")
    for model, now in ((plain, True), (split, False), (split, True)):
        assert isinstance(loop.synchronize(several, model, "prepared", now), contextlib.nullcontext)


def test_what_the_objective_calls_has_autocast(split):
    inside = []

    @contextlib.contextmanager
    def autocast():
        inside.append(True)
        yield
        inside.pop()

    accelerate = SimpleNamespace(autocast=autocast, prepare_model=lambda model: ("prepared", model))
    plain = nn.Linear(2, 2).eval()
    assert loop.prepare(accelerate, plain) == ("prepared", plain)
    split.register_forward_hook(lambda *_: inside.append("called"))
    x = torch.ones(1, 2)
    assert torch.equal(loop.prepare(accelerate, split)(x), nn.Linear.forward(split, x))
    assert inside == [True], "the hook ran inside"
    assert plain.training
    assert split.training


def test_dropout_is_drawn_from_seed_step_process_and_micro_batch():
    drawn = set()
    for arguments in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        numbers = []
        for _ in range(2):
            loop.seed_dropout(*arguments)
            numbers.append(float(torch.rand(())))
        assert numbers[0] == numbers[1]
        drawn.add(numbers[0])
    assert len(drawn) == 5


def test_a_line_of_the_log_has_no_norm_of_the_line_before(clock):
    meter = Meter(accelerator(), batch_images=4, flops_per_image=1.0, max_skipped=0)
    meter.add(good(1, norm=2.0))
    clock[0] += 1
    assert meter.record(1, 1e-3)["grad_norm"] == 2.0
    clock[0] += 1
    assert meter.record(2, 1e-3)["grad_norm"] is None


def test_the_curve_shows_the_log_its_mean_over_eleven_lines_and_the_figures(tmp_path, monkeypatch):
    losses = [float(i % 7) for i in range(30)]
    records = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)]
    records += [{"step": 100, "evaluated": "ema", "fid": 9.0}, {"step": 200, "evaluated": "ema", "fid": 5.0}]
    run = SimpleNamespace(path=tmp_path, read_log=lambda: [*records, {"step": 300, "loss": None}])
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    assert reports.draw_loss_curve(run) == tmp_path / "loss.png"
    curve, figures = kept[0].axes
    drawn, mean = curve.lines
    assert list(drawn.get_xdata()) == list(mean.get_xdata()) == [10 * i for i in range(30)]
    assert list(drawn.get_ydata()) == losses
    assert mean.get_ydata()[15] == fmean(losses[10:21])
    assert [mean.get_ydata()[0], mean.get_ydata()[-1]] == [fmean(losses[:6]), fmean(losses[-6:])]
    assert figures.lines[0].get_xydata().tolist() == [[100, 9], [200, 5]]
    assert figures.get_title() == "fid"
    assert list(kept[0].get_size_inches()) == [11, 4]


@pytest.mark.parametrize("is_main", [True, False])
def test_the_clock_of_the_main_process_alone_asks_for_checkpoints(is_main, monkeypatch):
    monkeypatch.setattr(reports.time, "monotonic", lambda: now[0])
    now = [0.0]
    config = SimpleNamespace(train=SimpleNamespace(save_every_minutes=1))
    run = SimpleNamespace(config=config, accelerator=SimpleNamespace(is_main_process=is_main))
    alarm = Checkpoints(run, 0, None, None).alarm
    now[0] = 1e6
    assert bool(alarm) == is_main


def test_the_checkpoint_before_an_error_has_read_all_reports(monkeypatch):
    counted, saved = [], []
    run = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(save_every_minutes=0)),
        accelerator=SimpleNamespace(is_main_process=True, num_processes=1),
    )
    pending = SimpleNamespace(flush=lambda: ["the last report"])
    checkpoints = Checkpoints(run, 2, pending, SimpleNamespace(add=counted.append))
    monkeypatch.setattr(Checkpoints, "save", lambda self, at: saved.append((at, list(counted))))
    for step in (2, 3):
        words = "the data cannot be read: Input/output error"
        with (
            pytest.raises(StorageError, match=words),
            checkpoints.saved_first(Progress(step), words.partition(":")[0]),
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert saved == [(Progress(3), ["the last report"])], "after step 2 there was one already"
