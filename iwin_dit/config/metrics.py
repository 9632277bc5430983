"""The metrics of each extractor, and how their figures are called; without torch."""

from __future__ import annotations

from collections.abc import Mapping

from iwin_dit.runtime.errors import ConfigError

EXTRACTORS = {  # the metrics of each; the first is the default
    "inception": ("fid", "sfid", "kid", "is", "pr"),
    "dinov2": ("fd", "kid", "pr"),
    "iwin": ("fd", "kid", "pr"),
    "i3d": ("fvd",),
}


TITLES = {"fd": "FD", "fvd": "FVD", "kid": "KID", "kid_std": "KID_std"}  # of figures that are not Inception's


def chosen_metrics(
    extractor: str, metrics: list[str] | None, inception_weights: str | None = None, prefix: str = "--"
) -> list[str]:
    """The metrics that an extractor is asked for; without any, its first.

    Args:
        prefix: of the options' names in an error.

    Raises:
        ConfigError: where there is no such extractor, or it has no such metric.
    """
    kind, colon, source = extractor.partition(":")
    if kind not in EXTRACTORS or (bool(colon), bool(source)) not in _SOURCES[kind]:
        raise ConfigError(
            f"{prefix}extractor is {extractor}, expected inception, dinov2, dinov2:FILE, iwin:RUN or i3d:FILE"
        )
    if kind != "inception" and inception_weights is not None:
        raise ConfigError(
            f"{prefix}inception-weights is of no use with {prefix}extractor {kind}; leave one of them out"
        )
    allowed = EXTRACTORS[kind]
    for name in metrics or ():
        if name not in allowed:
            known = any(name in others for others in EXTRACTORS.values())
            what = f"{name} is not of {prefix}extractor {kind}" if known else f"{prefix}metrics has {name!r}"
            raise ConfigError(f"{what}; take some of {', '.join(allowed)}")
    return list(metrics or allowed[:1])


_SOURCES = {  # whether a colon, and something after it, may follow the extractor's name
    "inception": ((False, False),),
    "dinov2": ((False, False), (True, True)),
    "iwin": ((True, True),),
    "i3d": ((True, True),),
}


def name_figures(figures: Mapping[str, float], kind: str) -> dict[str, float]:
    """Figures under the names that they are published by: ``fid``, but ``FD (dinov2)``, never FID."""
    if kind == "inception":
        return dict(figures)
    return {f"{TITLES.get(name, name)} ({kind})": value for name, value in figures.items()}
