"""The Frechet distance between two sets of features, from moments that are gathered batch by batch.

All in float64. Legend: N samples, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
