"""From features to figures: Frechet distances by our own code; KID, IS, precision, recall by torch-fidelity.

Legend: N generated, M real samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from iwin_dit.evaluation.frechet import Moments, frechet_distance
from iwin_dit.runtime.errors import DataError

KID_SUBSET = 1000  # samples of each of 100 random subsets


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
    """What metrics need of one set of images: moments per layer, and all features of a layer where asked.

    Args:
        metrics: names of :data:`METRICS`.
    """

    def __init__(self, metrics: Iterable[str]):
        wanted = [METRICS[name] for name in metrics]
        self.whole: dict[str, list[Tensor]] = {metric.layer: [] for metric in wanted if metric.every_sample}
        self.layers = {metric.layer for metric in wanted if not metric.every_sample}
        self.moments: dict[str, Moments] = {}

    def add(self, features: dict[str, Tensor]) -> None:
        """Adds a batch: ``{layer: (B, D)}``."""
        for layer in self.layers:
            batch = features[layer]
            self.moments.setdefault(layer, Moments.empty(batch.shape[1])).add(batch)
        for layer, batches in self.whole.items():
            batches.append(features[layer].detach().float().cpu())

    def all(self, layer: str) -> Tensor:
        """All features of a layer, ``(N, D)``."""
        return torch.cat(self.whole[layer])


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


def compute(metrics: Iterable[str], generated: Features, real: Features | None) -> dict[str, float]:
    """The figures, by name.

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
        own = generated.all(layer)
        if name == "is":
            check_counts([name], len(own), None)
            found = isc_features_to_metric(own)
            figures["is"], figures["is_std"] = (
                found["inception_score_mean"],
                found["inception_score_std"],
            )
            continue
        others = real.all(layer)
        check_counts([name], len(own), len(others))
        if name == "kid":
            size = min(KID_SUBSET, len(own), len(others))
            found = kid_features_to_metric(own, others, kid_subset_size=size, verbose=False)
            figures["kid"] = found["kernel_inception_distance_mean"]
            figures["kid_std"] = found["kernel_inception_distance_std"]
        else:
            found = prc_features_to_metric(own, others, save_cpu_ram=True, verbose=False)
            figures["precision"], figures["recall"] = found["precision"], found["recall"]
    return figures
