"""The extractors of features with their metrics, and how figures are called; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from iwin_dit.runtime.errors import ConfigError


class ExtractorKind(NamedTuple):
    """What a config knows of a network whose features are compared.

    implementation: what makes it of its source, a path or None: module, colon and name.
    metrics: that it serves, of :data:`iwin_dit.evaluation.metrics.METRICS`; the first is the default.
    source: what may follow its name and a colon, in the words of an error; None for nothing.
    needs_source: it cannot do without.
    of_clips: it looks at clips.
    """

    implementation: str
    metrics: tuple[str, ...]
    source: str | None = None
    needs_source: bool = False
    of_clips: bool = False


EXTRACTORS: dict[str, ExtractorKind] = {
    "inception": ExtractorKind(
        "iwin_dit.evaluation.extractors:Inception", ("fid", "sfid", "kid", "is", "pr")
    ),
    "dinov2": ExtractorKind("iwin_dit.evaluation.extractors:DINOv2", ("fd", "kid", "pr"), source="FILE"),
    "efficientnet-lite0": ExtractorKind(
        "iwin_dit.evaluation.efficientnet:efficientnet_lite0", ("fd", "kid", "pr"), source="FILE"
    ),
    "iwin": ExtractorKind(
        "iwin_dit.build.evaluation:own_classifier", ("fd", "kid", "pr"), source="RUN", needs_source=True
    ),
    "i3d": ExtractorKind(
        "iwin_dit.evaluation.i3d:I3D", ("fvd",), source="FILE", needs_source=True, of_clips=True
    ),
}


TITLES = {"fd": "FD", "fvd": "FVD", "kid": "KID", "kid_std": "KID_std"}  # of figures that are not Inception's


def looks_at_clips(extractor: str) -> bool:
    """Whether an extractor, as ``--extractor`` names it, compares clips."""
    return EXTRACTORS[extractor.partition(":")[0]].of_clips


def chosen_metrics(
    extractor: str, metrics: list[str] | None, inception_weights: str | None = None, prefix: str = "--"
) -> list[str]:
    """The metrics that an extractor is asked for; without any, its first.

    Args:
        prefix: of the options' names in an error.

    Raises:
        ConfigError: where there is no such extractor, or it has no such metric.
    """
    name, colon, source = extractor.partition(":")
    kind = EXTRACTORS.get(name)
    if kind is None or (not (source and kind.source) if colon else kind.needs_source):
        forms: list[str] = []
        for name, kind in EXTRACTORS.items():
            forms += [name] * (not kind.needs_source) + [f"{name}:{kind.source}"] * (kind.source is not None)
        expected = f"{', '.join(forms[:-1])} or {forms[-1]}"
        raise ConfigError(f"{prefix}extractor is {extractor}, expected {expected}")
    if name != "inception" and inception_weights is not None:
        raise ConfigError(
            f"{prefix}inception-weights is of no use with {prefix}extractor {name}; leave one of them out"
        )
    for metric in metrics or ():
        if metric not in kind.metrics:
            known = any(metric in other.metrics for other in EXTRACTORS.values())
            what = f"{metric} is not of {prefix}extractor {name}"
            what = what if known else f"{prefix}metrics has {metric!r}"
            raise ConfigError(f"{what}; take some of {', '.join(kind.metrics)}")
    return list(metrics or kind.metrics[:1])


def name_figures(figures: Mapping[str, float], extractor: str) -> dict[str, float]:
    """Figures under the names that they are published by: ``fid``, but ``FD (dinov2)``, never FID."""
    if extractor == "inception":
        return dict(figures)
    return {f"{TITLES.get(name, name)} ({extractor})": value for name, value in figures.items()}
