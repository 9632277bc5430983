"""Latents on disk, in the layout of LightningDiT's published ImageNet latents, with an index of our own.

```
latents_rank00_shard000.safetensors    latents, latents_flip (N, C, h, w) and labels (N,), maybe std, std_flip
index.json                             VAE, class names, mean and std per channel, size and hash per shard
```

Latents are the raw posterior means; they are normalised when they are read, by the index alone.
"""

from __future__ import annotations

import json
import math
import re
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
from iwin_dit.data.shards import ShardFile, read_rows
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError

FORMAT = 1
SHARD_NAME = re.compile(r"latents_rank\d{2,}_shard\d{3,}\.safetensors")


class Shard(NamedTuple):
    """Encoded images: latents and mirrored latents ``(N, C, h, w)``, labels ``(N,)``, maybe stds."""

    latents: Tensor
    latents_flip: Tensor
    labels: Tensor
    std: Tensor | None = None
    std_flip: Tensor | None = None


def write_shard(directory: Path, number: int, shard: Shard) -> dict[str, Any]:
    """Writes one shard, complete or not at all; returns its entry of the index, with sums for the statistics.

    Raises:
        DataError: where a value is not finite; nothing is written.
    """
    tensors = {key: tensor.contiguous() for key, tensor in shard._asdict().items() if tensor is not None}
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    name = f"latents_rank00_shard{number:03d}.safetensors"
    if bad:
        raise DataError(f"{bad[0]} of {name} is not finite; take --precision float32, or another VAE")
    data = save(tensors)
    files.replace(directory / name, data)
    values = shard.latents.double().movedim(1, 0).flatten(1)  # (C, N h w)
    return {
        "file": name,
        "count": len(shard.labels),
        **files.digest(data),
        "shape": list(shard.latents.shape[1:]),
        "sums": values.numpy().sum(1).tolist(),  # by numpy: pairwise, in one order whatever the threads
        "squares": values.square().numpy().sum(1).tolist(),
    }


def write_index(directory: Path, shards: Sequence[dict[str, Any]], description: dict[str, Any]) -> None:
    """Merges the entries of the shards into ``index.json``, which makes the set visible.

    Args:
        shards: what :func:`write_shard` returned, in order.
        description: ``vae``, ``image_size`` and ``class_names``, for the index.
    """
    count = sum(shard["count"] for shard in shards)
    if count == 0:
        raise DataError(f"{directory} would hold no images")
    shape = shards[0]["shape"]
    values = count * math.prod(shape[1:])
    mean = [math.fsum(channel) / values for channel in zip(*(s["sums"] for s in shards), strict=True)]
    square = [math.fsum(channel) / values for channel in zip(*(s["squares"] for s in shards), strict=True)]
    index = {
        "format": FORMAT,
        **description,
        "num_images": count,
        "latent_shape": shape,
        "mean": mean,
        "std": [math.sqrt(max(s - m * m, 0.0)) for s, m in zip(square, mean, strict=True)],
        "shards": [{key: shard[key] for key in ("file", "count", "bytes", "sha256")} for shard in shards],
    }
    files.replace(directory / "index.json", files.to_json(index))


def write_latents(directory: Path, shards: Iterable[Shard], description: dict[str, Any]) -> None:
    """Shards and index of a set that is small enough to be made at once."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = [write_shard(directory, number, shard) for number, shard in enumerate(shards)]
    write_index(directory, entries, description)


def read_index(directory: Path) -> dict[str, Any]:
    """``index.json``, its fields checked.

    Raises:
        DataError: where it is missing or not ours.
    """
    path = directory / "index.json"
    try:
        index = json.loads(path.read_bytes())
        needed = {"format", "vae", "class_names", "latent_shape", "mean", "std", "shards"}
        if missing := needed - set(index):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if index["format"] != FORMAT:
            raise ValueError(f"it has format {index['format']}, this version reads {FORMAT}")
    except FileNotFoundError:
        raise DataError(f"there are no latents in {directory}: {path} does not exist") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not an index of latents: {error}") from error
    return index


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
        self.index = read_index(self.directory) if index is None else index
        self.class_names: list[str] = self.index["class_names"]
        self.latent_shape: tuple[int, ...] = tuple(self.index["latent_shape"])
        self.mean, self.std = self.index["mean"], self.index["std"]
        self.shards = [self._open(entry) for entry in self.index["shards"]]
        self.ends = np.cumsum([entry["count"] for entry in self.index["shards"]])
        if len({shard.entries["latents"].dtype for shard in self.shards}) > 1:
            raise DataError(f"the shards of {self.directory} hold several dtypes; extract them alike")
        self.has_posterior = all("std" in shard.entries for shard in self.shards)

    def _open(self, entry: dict[str, Any]) -> ShardFile:
        path = self.directory / entry["file"]
        if not SHARD_NAME.fullmatch(entry["file"]):
            raise DataError(
                f"the index of {self.directory} names {entry['file']!r}, which is no shard of latents"
            )
        found = path.stat().st_size if path.is_file() else 0
        if found != entry.get("bytes", found):
            raise DataError(
                f"{path} has {found} bytes, the index says {entry['bytes']}; remove it and extract again"
            )
        shard = ShardFile(path)
        for name in ("latents", "latents_flip"):
            found = shard.entries.get(name)
            if found is None or found.shape != (entry["count"], *self.latent_shape):
                raise DataError(f"{path} does not hold {entry['count']} {name} of shape {self.latent_shape}")
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
        """As they were written, float32: ``(B, C, h, w)``."""
        indices, key = np.asarray(indices), f"{name}_flip" if mirrored else name
        numbers = np.searchsorted(self.ends, indices, side="right")
        firsts = self.ends - [shard.entries[key].shape[0] for shard in self.shards]
        values = read_rows(self.shards, key, numbers, indices - firsts[numbers])
        dtype = self.shards[0].entries[key].dtype
        return torch.from_numpy(values).view(dtype).reshape(len(indices), *self.latent_shape).float()

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
    def vae_name(self) -> str:
        """The VAE, as the index names it."""
        return self.index["vae"]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes these latents the same to a run that is resumed."""
        return {key: self.index.get(key) for key in ("vae", "vae_sha256", "latent_shape", "mean", "std")} | {
            "images": len(self)
        }


def published_index(
    directory: Path, statistics: dict[str, Tensor], vae: str, num_classes: int
) -> dict[str, Any]:
    """An index for a folder in LightningDiT's published layout, which has shards and statistics only.

    Args:
        statistics: ``mean`` and ``std`` per channel, ``(1, C, 1, 1)``, of its ``latents_stats.pt``.
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
    entries = [ShardFile(path).entries for path in paths]
    if not all("latents" in entry for entry in entries):
        raise DataError(f"{paths[0]} holds no latents")
    return {
        "vae": vae,
        "class_names": [str(label) for label in range(num_classes)],
        "latent_shape": list(entries[0]["latents"].shape[1:]),
        "mean": statistics["mean"].flatten().tolist(),
        "std": statistics["std"].flatten().tolist(),
        "shards": [
            {"file": path.name, "count": entry["latents"].shape[0]}
            for path, entry in zip(paths, entries, strict=True)
        ],
    }
