"""From features to figures: which metric needs what, and all of them by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
