"""From features to figures: which metric needs what, all of them by their names, and the Frechet distance.

All in float64. Legend: N samples, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwin_dit.evaluation.every_sample import (
    CPU,
    Samples,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from iwin_dit.runtime.errors import DataError


@dataclass
class Moments:
    """Count, mean ``(D,)`` and scatter ``(D, D)``, the sum of outer products of deviations, of samples.

    They need as much memory for fifty thousand samples as for five hundred, and hardly depend on the batches.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def empty(cls, features: int) -> Moments:
        """Of no samples of so many features."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of ``(N, D)``."""
        moments = cls.empty(features.shape[1])
        moments.add(features)
        return moments

    def add(self, features: Tensor) -> None:
        """Adds a batch ``(N, D)``."""
        values = features.detach().to("cpu", torch.float64).numpy()
        if len(values):
            mean = values.mean(0)
            deviations = values - mean
            self.merge(Moments(len(values), mean, deviations.T @ deviations))

    def merge(self, other: Moments) -> None:
        """Adds what another has gathered (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        self.scatter += other.scatter + np.outer(delta, delta) * (self.count * other.count / max(count, 1))
        self.mean = self.mean + delta * (other.count / max(count, 1))
        self.count = count

    def __len__(self) -> int:
        return self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased, ``(D, D)``; of at least two samples."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """``|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))`` of two normal distributions (Dowson and Landau 1982).

    The trace of the square root is the sum of the singular values of ``A^(1/2) B^(1/2)``, which stay right
    where covariances are singular, as those of fewer samples than features are.
    """
    difference = a.mean - b.mean
    cross = np.linalg.svd(_square_root(a.covariance) @ _square_root(b.covariance), compute_uv=False).sum()
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def _square_root(covariance: NDArray) -> NDArray:
    """The symmetric root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


class Metric(NamedTuple):
    """A metric of two sets of features.

    figures: the names of the numbers that ``compute`` returns.
    layer: of the extractor, whose features are compared.
    compute: ``compute(generated, real, device)``, on :class:`Samples` where ``every_sample`` is set, else on
        :class:`Moments`; ``real`` is None where there is no reference.
    every_sample: it needs the features of every sample, and not their moments alone.
    needs_reference: it needs real images.
    least: samples on each side.
    """

    figures: tuple[str, ...]
    layer: str
    compute: Callable[[Any, Any, torch.device], tuple[float, ...]]
    every_sample: bool = False
    needs_reference: bool = True
    least: int = 2


def _frechet(generated: Moments, real: Moments, device: torch.device) -> tuple[float]:
    return (frechet_distance(generated, real),)


METRICS: dict[str, Metric] = {
    "fid": Metric(("fid",), "pool", _frechet),
    "sfid": Metric(("sfid",), "spatial", _frechet),
    "fd": Metric(("fd",), "pool", _frechet),  # FID's formula, of another extractor than Inception
    "fvd": Metric(("fvd",), "logits", _frechet),  # of clips, by I3D
    "kid": Metric(
        ("kid", "kid_std"), "pool", lambda own, real, device: kernel_distance(own, real), every_sample=True
    ),
    "is": Metric(
        ("is", "is_std"),
        "logits",
        lambda own, real, device: inception_score(own),
        every_sample=True,
        needs_reference=False,
        least=10,  # one in each of ten parts
    ),
    "pr": Metric(
        ("precision", "recall"),
        "pool",
        precision_and_recall,
        every_sample=True,
        least=5,  # beyond three neighbours and the sample itself
    ),
}


class Features:
    """What metrics need of one set of images: moments per layer, and every sample's features where asked.

    Args:
        metrics: names of :data:`METRICS`.
    """

    def __init__(self, metrics: Iterable[str]):
        wanted = [METRICS[name] for name in metrics]
        self.samples = {metric.layer: Samples(metric.layer) for metric in wanted if metric.every_sample}
        self.layers = {metric.layer for metric in wanted if not metric.every_sample}
        self.moments: dict[str, Moments] = {}

    def add(self, features: Mapping[str, Tensor], path: Path | None = None) -> None:
        """Adds a batch, ``{layer: (B, D)}``.

        Args:
            path: a file that holds the batch; every sample's features are read from it when they are needed.
        """
        for layer in self.layers:
            batch = features[layer]
            self.moments.setdefault(layer, Moments.empty(batch.shape[1])).add(batch)
        for layer, samples in self.samples.items():
            batch = features[layer].detach()
            samples.add(batch.float().cpu() if path is None else path, len(batch))

    def of(self, metric: Metric) -> Samples | Moments:
        """What this metric computes with."""
        return self.samples[metric.layer] if metric.every_sample else self.moments[metric.layer]


def check_counts(metrics: Iterable[str], generated: int, real: int | None) -> None:
    """Whether there are images enough; ``real`` is None where there are none, or statistics.

    Raises:
        DataError: where there are too few for one of the metrics.
    """
    for name in metrics:
        metric = METRICS[name]
        if metric.needs_reference and real is not None:
            least, found = min(generated, real), f" on each side, found {generated} and {real}"
        else:
            least, found = generated, f", found {generated}"
        if least < metric.least:
            raise DataError(f"{name} needs {metric.least} images or more{found}")


def compute(
    metrics: Iterable[str],
    generated: Features,
    real: Features | None,
    device: torch.device = CPU,
) -> dict[str, float]:
    """The figures, by name; distances between all samples are computed on the device.

    Raises:
        DataError: where there are too few samples for one; see :func:`check_counts`.
    """
    figures: dict[str, float] = {}
    for name in metrics:
        metric = METRICS[name]
        own, other = generated.of(metric), None
        if metric.needs_reference and real is not None:
            other = real.of(metric)
        check_counts([name], len(own), None if other is None else len(other))
        figures |= zip(metric.figures, metric.compute(own, other, device), strict=True)
    return figures
