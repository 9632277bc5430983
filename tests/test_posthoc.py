"""Power-function averages against their integrals, and reconstructed ones against tracked ones."""

import math

import numpy as np
import pytest
import torch

from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import CheckpointError, ConfigError
from iwin_dit.training.ema import (
    combination,
    inner_product,
    misfit,
    power_decay,
    power_gamma,
    power_std,
    reconstruct,
)

STORED = (0.05, 0.1)
# reconstructed width: tolerance, in units of the distance between the two stored averages; about three times
# what was measured at step 1500, where the snapshots are relatively furthest apart
WANTED = {0.03: 0.05, 0.04: 0.01, 0.07: 0.003, 0.12: 0.003, 0.15: 0.01, 0.2: 0.06}
LAST, EVERY = 3000, 100


def profile(gamma, end, times):
    """(gamma + 1) t^gamma / T^(gamma + 1), and 0 after T."""
    return np.where(times <= end, (gamma + 1) / end * (times / end) ** gamma, 0.0)


def midpoints(end, count):
    return (np.arange(count) + 0.5) * (end / count)


# --- one average


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_the_paper(std, gamma):
    assert power_gamma(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, power_std(0.0)])
def test_std_and_gamma_are_inverse(std):
    assert power_std(power_gamma(std)) == pytest.approx(std, rel=1e-12)
    assert power_gamma(std) >= 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 100.0])
def test_std_is_that_of_the_profile(gamma):
    tau = midpoints(1, 200_000)
    weight = profile(gamma, 1, tau) / len(tau)
    mean = (weight * tau).sum()
    assert weight.sum() == pytest.approx(1, rel=1e-6)
    assert power_std(gamma) == pytest.approx((weight * (tau - mean) ** 2).sum() ** 0.5, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.289, 1.0, float("nan"), float("inf")])
def test_a_width_that_no_profile_has(std):
    with pytest.raises(ValueError, match=rf"found .* {std} .*expected one in \(0, 0\.2887\]; choose"):
        power_gamma(std)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_updates_are_the_integral_of_the_profile(std):
    """Each step's weights count by their share of the profile; the first update takes them as they are."""
    gamma, steps = power_gamma(std), 500
    weights = np.random.default_rng(0).standard_normal((steps, 8)).cumsum(0) + 5
    average = np.full(8, 1e6)  # forgotten at once
    for step in range(1, steps + 1):
        decay = power_decay(step, gamma)
        average = decay * average + (1 - decay) * weights[step - 1]
        if step == 1:
            assert decay == 0
            np.testing.assert_array_equal(average, weights[0])
    share = np.diff((np.arange(steps + 1) / steps) ** (gamma + 1))  # of [k - 1, k]
    np.testing.assert_allclose(average, share @ weights, rtol=1e-12)
    fine = midpoints(steps, 1000 * steps)
    sampled = profile(gamma, steps, fine).reshape(steps, 1000).mean(1)
    np.testing.assert_allclose(average, sampled @ weights, rtol=1e-5)


# --- several


@pytest.mark.parametrize(
    ("a", "b"),
    [((16.97, 3000), (6.94, 2000)), ((6.94, 1), (6.94, 1)), ((0.0, 7), (0.3, 11)), ((50, 9), (2, 8))],
)
def test_inner_products(a, b):
    nodes, weights = np.polynomial.legendre.leggauss(100)
    end = min(a[1], b[1])
    times = (nodes + 1) * end / 2
    integral = (weights * profile(*a, times) * profile(*b, times)).sum() * end / 2
    assert inner_product(*a, *b) == pytest.approx(integral, rel=1e-5)
    assert inner_product(*b, *a) == pytest.approx(integral, rel=1e-5)


def test_inner_products_of_long_runs_do_not_overflow():
    """1e9^1000 would; only ratios of steps matter, and the unit."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        large = inner_product(1000.0, 10**9, 500.0, 10**9 - 10**5)
    assert large == pytest.approx(inner_product(1000.0, 10**4, 500.0, 10**4 - 1) * 1e-5, rel=1e-9)
    assert large > 0


def test_the_fit_is_the_least_squares_one():
    """Against profiles sampled finely, and the sum's constraint put in by elimination."""
    stds, steps, std, step = [0.05] * 4 + [0.1] * 4, [50, 100, 150, 200] * 2, 0.13, 150
    times = midpoints(max(steps), 100_000)
    columns = [profile(power_gamma(s), t, times) for s, t in zip(stds, steps, strict=True)]
    others = np.stack(columns[:-1], axis=1) - columns[-1][:, None]
    head = np.linalg.lstsq(others, profile(power_gamma(std), step, times) - columns[-1], rcond=None)[0]
    found = combination(stds, steps, std, step)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [*head, 1 - head.sum()], atol=1e-5)


@pytest.mark.parametrize(("std", "step"), [(0.02, 400), (0.05, 200), (0.15, 350), (0.28, 400), (0.1, 40)])
def test_coefficients_sum_to_one_and_stay_small(std, step):
    steps = list(range(4, 401, 4))
    found = combination([0.05] * 100 + [0.1] * 100, steps * 2, std, step)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert np.linalg.norm(found) < 50


def test_a_stored_average_is_its_own_combination():
    stds, steps = [0.05, 0.05, 0.1, 0.1], [100, 200, 100, 200]
    np.testing.assert_allclose(combination(stds, steps, 0.1, 100), [0, 0, 1, 0], atol=1e-12)
    twice = combination([*stds, 0.1], [*steps, 100], 0.1, 100)  # singular: the two share
    np.testing.assert_allclose(twice, [0, 0, 0.5, 0, 0.5], atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.05], [10, 20], 0.1, 10), "found 1 stds and 2 steps"),
        (([], [], 0.1, 10), "found 0 stds and 0 steps"),
        (([0.05, 0.1], [0, 10], 0.1, 10), "found a snapshot of step 0"),
        (([0.05, 0.1], [10, 20], 0.1, 21), "found step 21, expected 10 to 20"),
        (([0.05, 0.1], [10, 20], 0.1, 9), "found step 9, expected 10 to 20"),
        (([0.05, 0.1], [10, 20], 0.3, 20), "deviation 0.3 "),
        (([0.05, 0.5], [10, 20], 0.1, 20), "deviation 0.5 "),
    ],
)
def test_what_cannot_be_combined(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        combination(*arguments)
    assert isinstance(caught.value, ConfigError)


# --- from disk


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A random walk that begins far from zero, as weights do, with float32 averages saved on the way.

    Returns:
        the snapshots' directory, and ``{(std, step): float64 average}`` tracked along, flat.
    """
    root = tmp_path_factory.mktemp("snapshots")
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a.weight": torch.randn(8, 6, generator=generator),
        "a.bias": torch.randn(5, generator=generator),
    }
    averages = {std: {name: torch.zeros_like(value) for name, value in weights.items()} for std in STORED}
    stds = (*STORED, *WANTED)
    gammas = {std: power_gamma(std) for std in stds}
    exact = torch.zeros(len(stds), 53, dtype=torch.float64)
    tracked = {}
    for step in range(1, LAST + 1):
        for value in weights.values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.01)
        for std, average in averages.items():
            for name, value in average.items():
                value.lerp_(weights[name], 1 - power_decay(step, gammas[std]))
        decays = torch.tensor([power_decay(step, gammas[std]) for std in stds], dtype=torch.float64)
        exact.lerp_(flat(weights).expand_as(exact), (1 - decays)[:, None])
        if step % EVERY == 0:
            tracked |= {(std, step): row.clone() for std, row in zip(stds, exact, strict=True)}
            groups = {f"ema_std_{std!r}": average for std, average in averages.items()}
            checkpoint.save_checkpoint(root, step, groups, {}, keep=10**6)
    return root, tracked


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in ("a.weight", "a.bias")])


@pytest.mark.parametrize("step", [1500, 2000, LAST])
@pytest.mark.parametrize("std", WANTED)
def test_reconstructed_averages_are_the_tracked_ones(trained, std, step):
    root, tracked = trained
    unit = (tracked[0.05, step] - tracked[0.1, step]).norm()
    error = (flat(reconstruct(root, std, step)) - tracked[std, step]).norm() / unit
    assert error < WANTED[std]
    nearest = min((tracked[stored, step] - tracked[std, step]).norm() for stored in STORED) / unit
    assert error < nearest / 5, "and much nearer than any stored one"


@pytest.mark.parametrize("std", STORED)
@pytest.mark.parametrize("step", [EVERY, 2000, LAST])
def test_stored_averages_come_back(trained, std, step):
    root, _ = trained
    found = reconstruct(root, std, step)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"a.weight": (8, 6), "a.bias": (5,)}
    stored = checkpoint.read_tensors(root / f"step-{step:08d}", f"ema_std_{std!r}")
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, stored[name], rtol=1e-6, atol=1e-7)


def test_the_last_step_is_the_default(trained):
    root, _ = trained
    found, last = reconstruct(root, 0.07), reconstruct(root, 0.07, LAST)
    assert all(torch.equal(found[name], last[name]) for name in last)


def test_the_misfit_is_the_distance_of_the_profiles():
    """By Riemann sums of the profiles themselves."""
    stds, steps, std, step = [0.05, 0.1, 0.05, 0.1], [500, 500, 1000, 1000], 0.02, 1000
    t = (np.arange(200_000) + 0.5) / 200

    def profile(width, end):
        gamma = power_gamma(width)
        return np.where(t <= end, (gamma + 1) / end * (t / end) ** gamma, 0.0)

    found = sum(
        c * profile(*each) for c, *each in zip(combination(stds, steps, std, step), stds, steps, strict=True)
    )
    wanted = profile(std, step)
    expected = math.sqrt(((found - wanted) ** 2).sum() / (wanted**2).sum())
    assert 0.3 < expected < 0.4
    assert misfit(stds, steps, std, step) == pytest.approx(expected, rel=1e-3)


def test_widths_that_the_snapshots_give_only_roughly(tmp_path):
    """The error tells the widths that they do give."""
    for step in (500, 1000):
        groups = {f"ema_std_{std!r}": {"a": torch.ones(2)} for std in (0.05, 0.1)}
        checkpoint.save_checkpoint(tmp_path, step, groups, {}, keep=9)
    for std, off in ((0.01, "61%"), (0.25, "73%")):
        message = rf"would be {off} off: .*2 steps, of 0\.05, 0\.1\) give widths from 0\.037 to 0\.12\d"
        with pytest.raises(ConfigError, match=message):
            reconstruct(tmp_path, std)
    for std in (0.037, 0.05, 0.07, 0.12):
        assert reconstruct(tmp_path, std)["a"].tolist() == pytest.approx([1, 1])


def test_steps_that_were_not_saved(trained):
    with pytest.raises(ValueError, match=f"found step {LAST + 1}, expected {EVERY} to {LAST}"):
        reconstruct(trained[0], 0.07, LAST + 1)


@pytest.mark.parametrize("names", [(), ("model", "ema", "ema_0.999", "ema_std_x")])
def test_a_run_without_snapshots(tmp_path, names):
    for name in names:
        checkpoint.save_checkpoint(tmp_path / "snapshots", 10, {name: {"a": torch.ones(2)}}, {}, keep=9)
    with pytest.raises(CheckpointError, match=r"needs ema\.power_stds .* and ema\.snapshot_every_steps"):
        reconstruct(tmp_path / "snapshots", 0.1)


def test_damaged_snapshots_and_other_models(tmp_path):
    for step, size in ((10, 2), (20, 3)):
        checkpoint.save_checkpoint(tmp_path, step, {"ema_std_0.1": {"a": torch.ones(size)}}, {}, keep=9)
    with pytest.raises(CheckpointError, match=r"step-00000020.* does not fit the model at a"):
        reconstruct(tmp_path, 0.1)
    file = tmp_path / "step-00000010" / "ema_std_0.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000010.* the manifest says"):
        reconstruct(tmp_path, 0.1)


def test_names_are_those_of_repr(tmp_path):
    stds = (1e-05, 0.05, 0.1)
    groups = {f"ema_std_{std!r}": {"a": torch.full((2,), std)} for std in stds}
    checkpoint.save_checkpoint(tmp_path, 10, groups, {}, keep=9)
    for std in stds:
        torch.testing.assert_close(reconstruct(tmp_path, std)["a"], torch.full((2,), std))
