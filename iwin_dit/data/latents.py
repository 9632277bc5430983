"""Latents on disk, in the layout of LightningDiT's published ImageNet latents, with an index of our own.

```
latents_rank00_shard000.safetensors    latents, latents_flip (N, C, h, w) and labels (N,), maybe std, std_flip
index.json                             VAE, class names, mean and std per channel, size and hash per shard
```

Latents are the raw posterior means; they are normalised when they are read, by the index alone.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from iwin_dit.data.codec import normalize
from iwin_dit.data.latent_index import FORMAT, SHARD_NAME, check_index, read_index
from iwin_dit.data.shards import CHECKSUMS, ShardFile, checksums, read_rows
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError

ROWS = ("latents", "latents_flip", "std", "std_flip")  # of a shard: what has a row for each image
OF_SHARD = ("file", "count", "bytes", "sha256", "content_sha256")  # in the index


class Shard(NamedTuple):
    """Encoded images: latents and mirrored latents ``(N, C, h, w)``, labels ``(N,)``, maybe stds."""

    latents: Tensor
    latents_flip: Tensor
    labels: Tensor
    std: Tensor | None = None
    std_flip: Tensor | None = None


def write_shard(directory: Path, number: int, shard: Shard, with_checksums: bool = True) -> dict[str, Any]:
    """Writes one shard, complete or not at all; returns its entry of the index, with sums for the statistics.

    Args:
        with_checksums: of each row, which training compares; older versions wrote none.

    Raises:
        DataError: where a value is not finite; nothing is written.
        ValueError: where there are not as many labels as latents.
    """
    tensors = {key: tensor.contiguous() for key, tensor in shard._asdict().items() if tensor is not None}
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    name = f"latents_rank00_shard{number:03d}.safetensors"
    if bad:
        raise DataError(f"{bad[0]} of {name} is not finite; take --precision float32, or another VAE")
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        raise ValueError(f"{name}: { ({key: len(tensor) for key, tensor in tensors.items()}) } rows")
    if with_checksums:
        tensors[CHECKSUMS] = checksums([tensors[key] for key in ROWS if key in tensors])
    data = save(tensors)
    files.replace(directory / name, data)
    return {
        "file": name,
        "count": len(shard.labels),
        **files.digest(data),
        "shape": list(shard.latents.shape[1:]),
        **channel_sums(shard.latents),
    }


def content_sha256(hashes: Iterable[str]) -> str | None:
    """Of a shard, from those of its images' files; None where one is not known, as of a broken image."""
    hashes = list(hashes)
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if all(hashes) else None


def channel_sums(latents: Tensor) -> dict[str, list[float]]:
    """Sums of the values of each channel of ``(N, C, ...)``, and of their squares, for the statistics."""
    values = latents.double().movedim(1, 0).flatten(1)  # (C, N h w)
    # by numpy: pairwise, in one order whatever the threads
    return {"sums": values.numpy().sum(1).tolist(), "squares": values.square().numpy().sum(1).tolist()}


def channel_statistics(shards: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over shards with ``count``, ``shape`` and sums."""
    values = sum(shard["count"] for shard in shards) * math.prod(shards[0]["shape"][1:])
    mean, square = (
        [math.fsum(channel) / values for channel in zip(*(shard[key] for shard in shards), strict=True)]
        for key in ("sums", "squares")
    )
    return mean, [math.sqrt(max(s - m * m, 0.0)) for s, m in zip(square, mean, strict=True)]


def write_index(directory: Path, shards: Sequence[dict[str, Any]], description: dict[str, Any]) -> None:
    """Merges the entries of the shards into ``index.json``, which makes the set visible.

    Args:
        shards: what :func:`write_shard` returned, in order.
        description: ``vae``, ``image_size`` and ``class_names``, for the index.
    """
    count = sum(shard["count"] for shard in shards)
    if count == 0:
        raise DataError(f"{directory} would hold no images")
    mean, std = channel_statistics(shards)
    index = {
        "format": FORMAT,
        **description,
        "num_images": count,
        "latent_shape": shards[0]["shape"],
        "mean": mean,
        "std": std,
        "shards": [{key: shard[key] for key in OF_SHARD if key in shard} for shard in shards],
    }
    check_index(index, f"all of {directory}")
    files.replace(directory / "index.json", files.to_json(index))


def write_latents(directory: Path, shards: Iterable[Shard], description: dict[str, Any]) -> None:
    """Shards and index of a set that is small enough to be made at once."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = [write_shard(directory, number, shard) for number, shard in enumerate(shards)]
    write_index(directory, entries, description)


class LatentDataset(Dataset):
    """``dataset[i] -> (latent (C, h, w), label)``, normalised, float32; :meth:`read` takes a batch at once.

    Args:
        directory: where the shards lie.
        index: instead of ``index.json``, for folders that have none.

    Raises:
        DataError: where the index or a shard is missing, has another size, or is not ours.
    """

    def __init__(self, directory: str | Path, index: dict[str, Any] | None = None):
        self.directory = Path(directory)
        if index is not None:
            check_index(index, f"the index of {self.directory}")
        self.index = read_index(self.directory) if index is None else index
        self.class_names: list[str] = self.index["class_names"]
        self.latent_shape: tuple[int, ...] = tuple(self.index["latent_shape"])
        self.mean, self.std = self.index["mean"], self.index["std"]
        self.shards = [self._open(entry) for entry in self.index["shards"]]
        self.ends = np.cumsum([entry["count"] for entry in self.index["shards"]])
        if len({shard.entries["latents"].dtype for shard in self.shards}) > 1:
            raise DataError(f"the shards of {self.directory} hold several dtypes; extract them alike")
        self.has_posterior = all({"std", "std_flip"} <= set(shard.entries) for shard in self.shards)
        rows = ROWS[: 4 if self.has_posterior else 2]
        self._columns = {name: column for column, name in enumerate(rows)}
        counts = np.diff(self.ends, prepend=0)
        self.starts = self.ends - counts
        self.has_checksums = all(
            (found := shard.entries.get(CHECKSUMS)) is not None
            and (found.dtype, found.shape) == (torch.int64, (count, len(rows)))
            for shard, count in zip(self.shards, counts, strict=True)
        )

    def _open(self, entry: dict[str, Any]) -> ShardFile:
        path = self.directory / entry["file"]
        found = path.stat().st_size if path.is_file() else 0
        if found != entry.get("bytes", found):
            raise DataError(
                f"{path} has {found} bytes, the index says {entry['bytes']}; remove it and extract again"
            )
        shard = ShardFile(path)
        count = entry["count"]
        for name in (*ROWS, "labels"):
            is_label, found = name == "labels", shard.entries.get(name)
            if found is None and name.startswith("std"):
                continue
            shape = (count,) if is_label else (count, *self.latent_shape)
            if found is None or found.shape != shape or found.dtype.is_floating_point == is_label:
                has = f"no {name}" if found is None else f"{name} of shape {found.shape}, {found.dtype}"
                kind = "an integer" if is_label else f"floating point of shape {self.latent_shape}"
                raise DataError(
                    f"{path} has {count} images and {has}; expected {kind} for each; extract again"
                )
        return shard

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.read([i])[0], int(self.labels[i])

    @cached_property
    def labels(self) -> Tensor:
        """All labels, ``(N,)`` int64.

        Raises:
            DataError: where one is of no class.
        """
        labels = torch.cat([shard.all("labels").long() for shard in self.shards])
        wrong = ((labels < 0) | (labels >= len(self.class_names))).nonzero().flatten()
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"image {i} of {self.directory} has label {int(labels[i])}, expected 0 to "
                f"{len(self.class_names) - 1}; extract again, or mend class_names in index.json"
            )
        return labels

    def read(self, indices: Sequence[int], mirrored: bool = False) -> Tensor:
        """Normalised latents, or mirrored ones, of these images: ``(B, C, h, w)`` float32."""
        return normalize(self.read_raw(indices, mirrored), self.mean, self.std)

    def read_std(self, indices: Sequence[int], mirrored: bool = False) -> Tensor:
        """The posterior's standard deviations, in the scale of the normalised latents: ``(B, C, h, w)``."""
        return normalize(self.read_raw(indices, mirrored, "std"), [0.0] * len(self.std), self.std)

    def read_raw(self, indices: Sequence[int], mirrored: bool = False, name: str = "latents") -> Tensor:
        """As they were written, float32: ``(B, C, h, w)``.

        Raises:
            DataError: where one is not what was written, by its checksum; where there is none, not finite.
            StorageError: where a shard cannot be read.
        """
        images, key = np.asarray(indices), f"{name}_flip" if mirrored else name
        numbers = np.searchsorted(self.ends, images, side="right")
        rows = images - self.starts[numbers]
        values = read_rows(self.shards, key, numbers, rows)
        dtype, is_right = self.shards[0].entries[key].dtype, [True]
        latents = torch.from_numpy(values).view(dtype).reshape(len(images), *self.latent_shape).float()
        if self.has_checksums:
            wanted = self._checksums[images, self._columns[key]].tolist()
            is_right = [zlib.crc32(row) == crc for row, crc in zip(values, wanted, strict=True)]
        elif not math.isfinite(latents.sum()):  # a sum is the cheapest look at all
            is_right = torch.isfinite(latents).flatten(1).all(1).tolist()
        if not all(is_right):
            b = is_right.index(False)
            what = "is not what was written (CRC-32)" if self.has_checksums else "is not finite"
            raise DataError(
                f"row {rows[b]} of {key} in {self.shards[numbers[b]].path} {what}: the file or the memory is "
                f"damaged; look for more by extract_latents.py --verify {self.directory}"
            )
        return latents

    @cached_property
    def _checksums(self) -> np.ndarray:
        return np.concatenate([shard.all(CHECKSUMS).numpy().astype(np.uint32) for shard in self.shards])

    def draw(
        self, indices: Sequence[int], mirrored: Sequence[bool], rngs: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """For training: latents ``(B, C, h, w)`` and labels.

        Posterior means, or, where the shards hold standard deviations, samples of the posterior.
        """
        x0 = torch.empty(len(indices), *self.latent_shape)
        for flip in (False, True):
            chosen = [i for i, is_mirrored in enumerate(mirrored) if is_mirrored == flip]
            if not chosen:
                continue
            images = [indices[i] for i in chosen]
            x0[chosen] = self.read(images, flip)
            if self.has_posterior:
                noise = torch.stack([torch.randn(self.latent_shape, generator=rngs[i]) for i in chosen])
                x0[chosen] += self.read_std(images, flip) * noise
        return x0, self.labels[list(indices)].tolist()

    @property
    def vae_path(self) -> str:
        """The VAE's hub id, or its folder: a relative one is relative to the latents."""
        local = self.directory / self.index["vae"]
        return str(local.resolve()) if local.is_dir() else self.index["vae"]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes these latents the same to a run that is resumed."""
        found = {key: self.index.get(key) for key in ("vae", "vae_sha256", "latent_shape", "mean", "std")}
        found |= {"images": len(self), "classes": self.class_names}
        hashes = [shard.get("sha256") for shard in self.index["shards"]]
        if all(hashes):  # else published latents, which have none
            found["shards_sha256"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return found


def published_index(
    directory: Path, mean: list[float], std: list[float], vae: str, num_classes: int
) -> dict[str, Any]:
    """An index for a folder in LightningDiT's published layout, which has shards and statistics only.

    Args:
        mean, std: per channel, of its ``latents_stats.pt``.
        vae: what decodes them: a folder or a hub id.
        num_classes: classes of the data.

    Raises:
        DataError: where there are no shards.
    """
    paths = sorted(path for path in directory.iterdir() if SHARD_NAME.fullmatch(path.name))
    if not paths:
        raise DataError(
            f"there are no latents in {directory}: neither index.json nor latents_rank*_shard*.safetensors"
        )
    shapes = []
    for path in paths:
        entries = ShardFile(path).entries
        if "latents" not in entries:
            raise DataError(f"{path} holds no latents")
        shapes.append(entries["latents"].shape)
    return {
        "vae": vae,
        "class_names": [str(label) for label in range(num_classes)],
        "latent_shape": list(shapes[0][1:]),
        "mean": mean,
        "std": std,
        "shards": [{"file": path.name, "count": shape[0]} for path, shape in zip(paths, shapes, strict=True)],
    }
