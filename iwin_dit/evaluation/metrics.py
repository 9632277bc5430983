"""From features to figures: which metric needs what, and all of them by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from iwin_dit.evaluation.every_sample import (
    CPU,
    Samples,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from iwin_dit.evaluation.frechet import Moments, frechet_distance
from iwin_dit.runtime.errors import DataError


class Metric(NamedTuple):
    """The layer that a metric compares; whether it needs every sample's features, or moments alone; whether
    real images; and how many on each side at least.
    """

    layer: str
    every_sample: bool
    needs_reference: bool = True
    least: int = 2


METRICS = {
    "fid": Metric("pool", every_sample=False),
    "sfid": Metric("spatial", every_sample=False),
    "fd": Metric("pool", every_sample=False),  # FID's formula, of another extractor than Inception
    "kid": Metric("pool", every_sample=True),
    "fvd": Metric("logits", every_sample=False),  # of clips, by I3D
    "is": Metric("logits", every_sample=True, needs_reference=False, least=10),  # one in each of ten parts
    "pr": Metric("pool", every_sample=True, least=5),  # beyond three neighbours and the sample itself
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


def check_counts(metrics: Iterable[str], generated: int, real: int | None) -> None:
    """Whether there are images enough; ``real`` is None where there are none, or statistics.

    Raises:
        DataError: where there are too few for one of the metrics.
    """
    for name in metrics:
        metric = METRICS[name]
        both = metric.needs_reference and real is not None
        if min(generated, real if both else generated) < metric.least:
            found = f"on each side, found {generated} and {real}" if both else f"found {generated}"
            raise DataError(f"{name} needs {metric.least} images or more{' ' if both else ', '}{found}")


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
        layer = METRICS[name].layer
        if not METRICS[name].every_sample:
            a, b = generated.moments[layer], real.moments[layer]
            check_counts([name], a.count, b.count)
            figures[name] = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
            continue
        own = generated.samples[layer]
        others = real.samples[layer] if METRICS[name].needs_reference else None
        check_counts([name], len(own), None if others is None else len(others))
        if name == "is":
            figures["is"], figures["is_std"] = inception_score(own)
        elif name == "kid":
            figures["kid"], figures["kid_std"] = kernel_distance(own, others)
        else:
            figures["precision"], figures["recall"] = precision_and_recall(own, others, device)
    return figures
