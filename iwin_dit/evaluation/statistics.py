"""Means and covariances of features, kept in place of the images: ADM's ``.npz``, or ours, safetensors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from iwin_dit.evaluation.archives import BROKEN_NPZ, read_array
from iwin_dit.evaluation.images import Extractor
from iwin_dit.evaluation.metrics import Features, Moments
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, reason

STATISTICS = {  # ADM's names; of logits, as FVD has them
    "pool": ("mu", "sigma"),
    "logits": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
}


def read_statistics(path: Path, metrics: Iterable[str], extractor: Extractor) -> Features:
    """Of an ``.npz`` with ``mu, sigma`` and, for sFID, ``mu_s, sigma_s``, or of :func:`write_statistics`.

    Args:
        metrics: those that need moments alone.
        extractor: the one that is used now; ours say which one they are of.

    Raises:
        DataError: where the file does not hold them, or is of another extractor.
    """
    features = Features(metrics)
    try:
        if path.suffix == ".safetensors":
            found = _read_ours(path, features.layers, extractor)
        else:
            with zipfile.ZipFile(path) as archive:  # ADM's, which do not say of how many images they are
                found = {
                    layer: (2, *(read_array(archive, key) for key in STATISTICS[layer]))
                    for layer in features.layers
                }
        for layer, (count, mean, covariance) in found.items():
            if mean.ndim != 1 or covariance.shape != mean.shape * 2:
                raise ValueError(f"a covariance of shape {covariance.shape} beside means {mean.shape}")
            if count < 2:
                raise ValueError(f"they are of {count} images, expected 2 or more")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError("they are not finite")
            features.moments[layer] = Moments(count, mean, covariance * (count - 1))
    except (*BROKEN_NPZ, SafetensorError) as error:
        raise DataError(f"{path} does not hold statistics mu and sigma: {reason(error)}") from None
    return features


def _read_ours(path: Path, layers: Iterable[str], extractor: Extractor) -> dict[str, tuple[Any, ...]]:
    if path.stat().st_size > len(STATISTICS) * limits.ARRAY_BYTES:
        raise ValueError(f"it has more than {files.in_units(len(STATISTICS) * limits.ARRAY_BYTES)}")
    with safe_open(path, "np") as file:
        try:
            about = json.loads((file.metadata() or {})["about"])
            made_by, images = about.get("extractor"), about["images"]
            if not isinstance(images, int):
                raise TypeError
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise ValueError("it does not say what its numbers are of") from None
        if made_by != identity(extractor):
            raise ValueError(f"they are of the extractor {made_by}, not of {identity(extractor)}")
        names = set(file.keys())
        missing = [layer for layer in layers if f"{layer}.mu" not in names]
        if missing:
            raise ValueError(f"there is no {missing[0]}.mu in it; write them with the same --metrics")
        return {
            layer: (images, *(file.get_tensor(f"{layer}.{key}") for key in ("mu", "sigma")))
            for layer in layers
        }


def write_statistics(path: Path, features: Features, extractor: Extractor, source: Mapping[str, Any]) -> None:
    """Means and covariances of all layers that were gathered, what made them and of what: safetensors."""
    tensors = {}
    for layer, moments in features.moments.items():
        tensors[f"{layer}.mu"] = torch.from_numpy(moments.mean)
        tensors[f"{layer}.sigma"] = torch.from_numpy(moments.covariance)
    images = {moments.count for moments in features.moments.values()}.pop()
    about = {"extractor": identity(extractor), "images": images, "source": dict(source)}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, save(tensors, {"about": json.dumps(about)}))


def identity(extractor: Extractor) -> dict[str, str]:
    """What features depend on beside the images."""
    return {key: getattr(extractor, key) for key in ("name", "sha256", "preprocessing")}
