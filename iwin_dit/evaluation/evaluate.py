"""From two sets of images to figures, on any number of processes, in constant memory, resumable.

A set is cut into chunks of :data:`CHUNK` images; chunk c is made by process ``c mod P`` and its features are
written to a file, with a hash that tells whether they are still what was written. The main process then
reads the files in order: so the figures depend neither on the number of processes nor on interruptions. Of
the features no more than a few blocks (:mod:`iwin_dit.evaluation.every_sample`) are in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from iwin_dit.evaluation.drawing import Export
from iwin_dit.evaluation.images import Extractor, Images, in_order
from iwin_dit.evaluation.metrics import Features
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import progress

CHUNK = 256


def extract_features(
    images: Images,
    extractor: Extractor,
    folder: Path,
    batch_size: int,
    accelerator: Accelerator,
    title: str = "features",
    export: Export | None = None,
) -> None:
    """Writes ``folder/chunk-00000.safetensors``, ...: those that are missing, or not as they were written.

    Args:
        images: what to look at.
        extractor: see :mod:`iwin_dit.evaluation.extractors`; on the accelerator's device.
        batch_size: images of one forward pass.
        accelerator: of the processes, each of which makes its share.
        export: where the images go too; a chunk whose images are not there is made again.

    Raises:
        DataError: where features are not finite, or an image cannot be read.
        WorkerError: where a process that reads images dies or hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers, count = extractor.layers, -(-len(images) // CHUNK)
    process, num_processes = accelerator.process_index, accelerator.num_processes
    with progress(total=len(images), unit="image", desc=title, disable=process != 0) as bar:
        ranges = {}
        for number in range(process, count, num_processes):
            start, stop = number * CHUNK, min(len(images), (number + 1) * CHUNK)
            is_there = _is_whole(chunk_path(folder, number), layers)
            if is_there and (export is None or export.has(start, stop)):
                bar.update((stop - start) * num_processes)
                continue
            firsts = range(start, stop, batch_size)
            ranges[number] = [(first, min(first + batch_size, stop)) for first in firsts]
        batches = in_order(
            images.read, [batch for chunk in ranges.values() for batch in chunk], images.workers
        )
        for number, chunk in ranges.items():
            parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
            kept: list[torch.Tensor] = []
            for _ in chunk:
                batch = next(batches)
                if export is not None:
                    kept.append(batch.cpu())
                found = extractor(batch.to(accelerator.device))
                for layer in layers:
                    parts[layer].append(found[layer].cpu())
            start, stop = chunk[0][0], chunk[-1][1]
            joined = {layer: torch.cat(tensors).contiguous() for layer, tensors in parts.items()}
            bad = [layer for layer, tensor in joined.items() if not torch.isfinite(tensor).all()]
            if bad:
                raise DataError(
                    f"images {start} to {stop - 1} of the {title} have features ({bad[0]}) that are not "
                    "finite; look at the model that drew them, or at the extractor"
                )
            if export is not None:
                export.write(start, torch.cat(kept))
            path = chunk_path(folder, number)
            files.replace(path, save(joined, {"sha256": _digest(path, joined)}))
            bar.update((stop - start) * num_processes)
    accelerator.wait_for_everyone()


def chunk_path(folder: Path, number: int) -> Path:
    """Where the features of a chunk lie."""
    return folder / f"chunk-{number:05d}.safetensors"


def _digest(path: Path, features: Mapping[str, torch.Tensor]) -> str:
    """Of a chunk's features and of where they belong, so that no other chunk's can stand in for them."""
    digest = hashlib.sha256(f"{path.parent.name}/{path.name}".encode())
    for layer, tensor in sorted(features.items()):
        digest.update(f"{layer} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _is_whole(path: Path, layers: Iterable[str]) -> bool:
    """Whether a chunk is there, with these layers, just as it was written."""
    try:
        with safe_open(path, "pt") as file:
            names, written = set(file.keys()), file.metadata() or {}
            features = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return False
    return names >= set(layers) and written.get("sha256") == _digest(path, features)


def read_features(folder: Path, images: int, metrics: Iterable[str]) -> Features:
    """What the metrics need of the chunks of a set of so many images."""
    features = Features(metrics)
    for number in progress(range(-(-images // CHUNK)), desc="moments", unit="chunk", leave=False):
        path = chunk_path(folder, number)
        features.add(load(files.read_bytes(path)), path)
    return features


def features_key(images: Images, extractor: Extractor) -> str:
    """What files of features depend on: the images, the extractor's weights and how it prepares images."""
    content = json.dumps(
        [2, CHUNK, extractor.name, extractor.sha256, extractor.preprocessing, images.fingerprint]
    )
    return hashlib.sha256(content.encode()).hexdigest()[:32]
