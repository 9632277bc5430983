"""Metrics that compare samples one by one, against their definitions written out in float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from iwin_dit.evaluation import every_sample
from iwin_dit.evaluation.every_sample import (
    Samples,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from iwin_dit.evaluation.metrics import Features, compute


def normal(count, seed, spread=1.0, shift=0.0, dimension=8):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=rng) * spread + shift


def samples(features, part=7):
    found = Samples("pool")
    for rows in features.split(part):
        found.add(rows, len(rows))
    return found


def precision_and_recall_by_definition(generated, real, k=3):
    """Kynkaanniemi et al. 2019, equations 1 and 2: loops over balls."""
    generated, real = (x.double().numpy() for x in (generated, real))

    def share_inside(points, centres):
        inside = np.zeros(len(points), bool)
        for centre in centres:
            reach = np.sort(np.sqrt(((centres - centre) ** 2).sum(1)))[k]  # the first is the centre itself
            inside |= np.sqrt(((points - centre) ** 2).sum(1)) <= reach
        return inside.mean()

    return share_inside(generated, real), share_inside(real, generated)


@pytest.mark.parametrize("block", [16, 100, 1000])
def test_precision_and_recall_are_their_definition(block, monkeypatch):
    """On sets where they are far from 0, from 1 and from each other; whatever the blocks."""
    monkeypatch.setattr(every_sample, "BLOCK", block)
    generated, real = normal(150, 0, 0.7, 0.3), normal(130, 1)
    found = precision_and_recall(samples(generated), samples(real))
    expected = precision_and_recall_by_definition(generated, real)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.2 < found[1] < found[0] - 0.2 < 0.79
    theirs = prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    swapped = precision_and_recall(samples(real), samples(generated))
    assert swapped == pytest.approx(found[::-1], abs=1e-12)


def test_copies_are_inside_though_rounding_would_move_them():
    """Real images of which each is there four times have balls of radius 0."""
    distinct = normal(40, 0, dimension=64) + 50
    copies = distinct.repeat(4, 1)
    generated = torch.cat([distinct[:10] * (1 + 1e-7), normal(10, 2, dimension=64) + 50])
    assert precision_and_recall(samples(generated), samples(copies))[0] == 0.5
    assert precision_and_recall(samples(copies), samples(copies)) == (1.0, 1.0)


def kernel_distance_by_definition(a, b, subset, subsets):
    """Binkowski et al. 2018: the unbiased estimate of MMD^2 with ``(x y / D + 1)^3``, over subsets."""
    a, b = (x.double().numpy() for x in (a, b))
    rng, found = np.random.RandomState(2020), []
    for _ in range(subsets):
        x, y = (z[rng.choice(len(z), subset, replace=False)] for z in (a, b))
        kernel = lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3  # noqa: E731
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        own = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (subset * (subset - 1))
        found.append(own - 2 * xy.mean())
    return np.mean(found), np.std(found)


def test_kid_is_its_definition_on_the_published_subsets(monkeypatch):
    """With more samples than a subset of 1,000 holds; of five subsets, since a hundred take a minute."""
    assert every_sample.KID_SUBSETS == DEFAULTS["kid_subsets"] == 100
    assert every_sample.KID_SUBSET == DEFAULTS["kid_subset_size"] == 1000
    generated, real = normal(1250, 0, 0.9, 0.2), normal(1100, 1)
    few = kernel_distance(samples(generated[:50]), samples(real[:40]))
    assert few == pytest.approx(kernel_distance_by_definition(generated[:50], real[:40], 40, 100), rel=1e-4)
    theirs = kid_features_to_metric(generated[:50], real[:40], kid_subset_size=40, verbose=False)
    assert few[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)

    monkeypatch.setattr(every_sample, "KID_SUBSETS", 5)
    found = kernel_distance(samples(generated, 256), samples(real, 256))
    assert found == pytest.approx(kernel_distance_by_definition(generated, real, 1000, 5), rel=1e-3)
    assert found[0] == pytest.approx(kernel_distance_by_definition(generated, real, 1000, 5)[0], rel=1e-5)
    for other in (999, 1001):
        expected = kernel_distance_by_definition(generated, real, other, 5)[0]
        assert found[0] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block", [3, 1000])
def test_the_inception_score_is_its_definition(block, monkeypatch):
    monkeypatch.setattr(every_sample, "BLOCK", block)
    logits = normal(103, 0, 4.0)
    logits[5, 0] = 2000  # whose other probabilities are 0
    found = inception_score(samples(logits))
    x = logits.double().numpy()[np.random.RandomState(2020).permutation(103)]
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 103 // 10 : (i + 1) * 103 // 10]
        ratio = np.where(part > 0, part / part.mean(0), 1)
        scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert 1.5 < found[0] < 7
    theirs = isc_features_to_metric(logits)
    assert found[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_features_are_read_from_their_files_when_they_are_needed(tmp_path):
    """Rows in any order; the figures are those of features in memory; nothing is kept."""
    kept, stored = Features(["kid", "pr", "is"]), Features(["kid", "pr", "is"])
    pool, logits = normal(60, 0), normal(60, 1, 3.0)
    for number, start in enumerate(range(0, 60, 16)):
        part = {"pool": pool[start : start + 16], "logits": logits[start : start + 16]}
        path = tmp_path / f"{number}.safetensors"
        save_file({name: rows.clone() for name, rows in part.items()}, path)
        kept.add(part)
        stored.add(part, path)
    order = np.random.default_rng(0).permutation(60)[:33]
    assert torch.equal(stored.samples["pool"].rows(order), pool[order])
    metrics, real = ["kid", "pr", "is"], Features(["kid", "pr"])
    real.add({"pool": normal(50, 3)})
    expected = compute(metrics, kept, real)
    assert compute(metrics, stored, real) == expected
    assert 0 < expected["precision"] < 1
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(OSError, match="No such file"):
        compute(["pr"], stored, real)


def test_figures_keep_generated_and_real_apart():
    generated, real = normal(150, 0, 0.7, 0.3), normal(130, 1)
    sides = Features(["pr", "kid"]), Features(["pr", "kid"])
    for side, values in zip(sides, (generated, real), strict=True):
        side.add({"pool": values})
    found = compute(["pr", "kid"], *sides)
    expected = precision_and_recall_by_definition(generated, real)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-12)
    assert abs(found["precision"] - found["recall"]) > 0.1
    expected = kernel_distance_by_definition(generated, real, 130, 100)
    assert (found["kid"], found["kid_std"]) == pytest.approx(expected, rel=1e-3)
