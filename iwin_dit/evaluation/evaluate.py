"""From two sets of images to figures, on any number of processes, in constant memory, resumable.

A set is cut into chunks of :data:`CHUNK` images; chunk c is made by process ``c mod P`` and its features are
written to a file. The main process then reads the files in order: so the figures depend neither on the number
of processes nor on interruptions, and no more than a chunk is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from iwin_dit.evaluation.frechet import Moments
from iwin_dit.evaluation.images import Images
from iwin_dit.evaluation.metrics import METRICS, Features
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import progress

CHUNK = 256
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names


def extract_features(
    images: Images,
    extractor: Any,
    layers: Iterable[str],
    folder: Path,
    batch_size: int,
    device: torch.device,
    process: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    title: str = "features",
) -> None:
    """Writes ``folder/chunk-00000.safetensors``, ...: those that are missing.

    Args:
        images: what to look at.
        extractor: ``extractor(uint8 images) -> {layer: (B, D)}``, on the device.
        layers: what to keep.
        batch_size: images of one forward pass.
        wait: a barrier for all processes.

    Raises:
        DataError: where features are not finite, or an image cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers, count = list(layers), -(-len(images) // CHUNK)
    with progress(total=len(images), unit="image", desc=title, disable=process != 0) as bar:
        for number in range(process, count, num_processes):
            path = chunk_path(folder, number)
            start, stop = number * CHUNK, min(len(images), (number + 1) * CHUNK)
            if not path.exists():
                parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
                for first in range(start, stop, batch_size):
                    batch = images.read(first, min(first + batch_size, stop))
                    found = extractor(batch.to(device))
                    for layer in layers:
                        parts[layer].append(found[layer].cpu())
                joined = {layer: torch.cat(tensors).contiguous() for layer, tensors in parts.items()}
                bad = [layer for layer, tensor in joined.items() if not torch.isfinite(tensor).all()]
                if bad:
                    raise DataError(
                        f"images {start} to {stop - 1} of the {title} have features ({bad[0]}) that are not "
                        "finite; look at the model that drew them, or at the extractor"
                    )
                files.replace(path, save(joined))
            bar.update((stop - start) * num_processes)
    wait()


def chunk_path(folder: Path, number: int) -> Path:
    """Where the features of a chunk lie."""
    return folder / f"chunk-{number:05d}.safetensors"


def read_features(folder: Path, images: int, metrics: Iterable[str]) -> Features:
    """What the metrics need of the chunks of a set of so many images."""
    features = Features(metrics)
    for number in range(-(-images // CHUNK)):
        features.add(load_file(chunk_path(folder, number)))
    return features


def features_key(images: Images, extractor: Any) -> str:
    """What features depend on: the images' content and the extractor's weights."""
    content = json.dumps([1, extractor.name, extractor.sha256, images.fingerprint])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def stored_statistics(path: Path, metrics: Iterable[str]) -> Features:
    """Published means and covariances: ``mu, sigma`` and, for sFID, ``mu_s, sigma_s``, as ADM names them.

    Raises:
        DataError: where the file does not hold them, or a metric needs every image's features.
    """
    metrics = list(metrics)
    whole = [name for name in metrics if METRICS[name].every_sample and METRICS[name].needs_reference]
    if whole:
        raise DataError(
            f"{path} holds statistics, {', '.join(whole)} needs the images themselves; give a folder"
        )
    features = Features(metrics)
    try:
        with np.load(path) as archive:
            for layer in features.layers:
                mean, covariance = (np.asarray(archive[key], np.float64) for key in STATISTICS[layer])
                if covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all():
                    raise ValueError(f"a covariance of shape {covariance.shape} beside {len(mean)} means")
                features.moments[layer] = Moments(
                    2, mean, covariance
                )  # of two samples: scatter is covariance
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} does not hold statistics mu and sigma: {error}") from None
    return features
