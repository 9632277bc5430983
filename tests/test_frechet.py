"""The Frechet distance against scipy, closed forms and torch-fidelity."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from iwin_dit.evaluation.metrics import Moments, frechet_distance


def features(count, dimension, seed):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dimension, dimension)) / dimension**0.5
    return torch.from_numpy(rng.standard_normal((count, dimension)) @ mixing + rng.standard_normal(dimension))


def moments(values, batch):
    found = Moments.empty(values.shape[1])
    for part in values.split(batch):
        found.add(part)
    return found


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_moments_are_those_of_numpy_whatever_the_batches(batch):
    values = features(300, 12, 0) * 3 + 1000
    found = moments(values, batch)
    assert found.count == 300
    np.testing.assert_allclose(found.mean, values.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(values.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_of_several_processes_are_merged():
    values = features(301, 12, 0)
    parts = [moments(values[rank::3], 10) for rank in range(3)]
    for part in parts[1:]:
        parts[0].merge(part)
    whole = moments(values, 301)
    np.testing.assert_allclose(parts[0].covariance, whole.covariance, rtol=1e-12, atol=1e-13)
    empty = Moments.empty(12)
    empty.merge(Moments.empty(12))
    empty.add(values[:0])
    assert empty.count == 0
    assert not empty.mean.any()


@pytest.mark.parametrize(("counts", "dimension"), [((300, 400), 16), ((100, 80), 256), ((100, 500), 128)])
def test_the_distance_is_scipys_and_torch_fidelitys(counts, dimension):
    """The second and third have fewer samples than features: the covariances are singular."""
    a, b = (features(count, dimension, seed) for seed, count in enumerate(counts))
    found = frechet_distance(moments(a, 50), moments(b, 64))
    mean_a, mean_b = a.numpy().mean(0), b.numpy().mean(0)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    witness = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert found == pytest.approx(witness, rel=1e-6)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-6)


def test_closed_forms():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 2, (2, 8))
    a[:3] = 0
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    shift = rng.standard_normal(8)
    covariances = (rotation @ np.diag(values) @ rotation.T for values in (a, b))
    found = frechet_distance(*map(Moments, (2, 2), (shift, np.zeros(8)), covariances))
    assert found == pytest.approx(shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    values = moments(features(50, 512, 0), 50)  # of fewer samples than features
    assert abs(frechet_distance(values, values)) < 1e-6 * np.trace(values.covariance)
