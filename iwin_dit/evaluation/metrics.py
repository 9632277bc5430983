"""From features to figures: FID and sFID by our own distance; KID, IS, precision, recall by torch-fidelity.

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
    """The layer that a metric compares, and whether it needs every sample's features, or moments alone."""

    layer: str
    every_sample: bool
    needs_reference: bool = True


METRICS = {
    "fid": Metric("pool", every_sample=False),
    "sfid": Metric("spatial", every_sample=False),
    "kid": Metric("pool", every_sample=True),
    "is": Metric("logits", every_sample=True, needs_reference=False),
    "pr": Metric("pool", every_sample=True),
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


def compute(metrics: Iterable[str], generated: Features, real: Features | None) -> dict[str, float]:
    """The figures, by name.

    Raises:
        DataError: where there are too few samples for one.
    """
    figures: dict[str, float] = {}
    for name in metrics:
        layer = METRICS[name].layer
        if name in ("fid", "sfid"):
            a, b = generated.moments[layer], real.moments[layer]
            if min(a.count, b.count) < 2:
                raise DataError(
                    f"{name} needs two images or more on each side, found {a.count} and {b.count}"
                )
            figures[name] = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
            continue
        own = generated.all(layer)
        if name == "is":
            found = isc_features_to_metric(own)
            figures["is"], figures["is_std"] = (
                found["inception_score_mean"],
                found["inception_score_std"],
            )
            continue
        others = real.all(layer)
        if name == "kid":
            size = min(KID_SUBSET, len(own), len(others))
            found = kid_features_to_metric(own, others, kid_subset_size=size, verbose=False)
            figures["kid"] = found["kernel_inception_distance_mean"]
            figures["kid_std"] = found["kernel_inception_distance_std"]
        else:
            if min(len(own), len(others)) < 5:
                raise DataError(
                    f"precision and recall need five images or more, found {len(own)}, {len(others)}"
                )
            found = prc_features_to_metric(own, others, save_cpu_ram=True, verbose=False)
            figures["precision"], figures["recall"] = found["precision"], found["recall"]
    return figures
