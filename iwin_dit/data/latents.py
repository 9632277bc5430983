"""Latent shards on disk, in the layout of LightningDiT's published ImageNet latents, with an index of our
own.

```
latents_rank00_shard000.safetensors    latents, latents_flip (N, C, h, w) and labels (N,)
index.json                             the VAE, class names, counts, mean and std per channel, size and hash
per shard ```

Latents are the raw posterior means; they are normalised when they are read, by the index alone.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from iwin_dit.data.codec import normalize
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError

FORMAT = 1


class Shard(NamedTuple):
    """Up to 10,000 encoded images: latents and mirrored latents ``(N, C, h, w)``, labels ``(N,)``."""

    latents: Tensor
    latents_flip: Tensor
    labels: Tensor


def write_latents(directory: Path, shards: Iterable[Shard], description: dict[str, Any]) -> None:
    """Writes the shards, then the index, which makes the set visible.

    Args:
        shards: in order.
        description: ``vae``, ``image_size`` and ``class_names``, for the index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    listed, total, squares, values, count, shape = [], 0.0, 0.0, 0, 0, None
    for number, shard in enumerate(shards):
        if not all(torch.isfinite(tensor).all() for tensor in shard):
            raise DataError(
                f"shard {number} of {directory} would hold values that are not finite; nothing was indexed"
            )
        name = f"latents_rank00_shard{number:03d}.safetensors"
        data = save({key: tensor.contiguous() for key, tensor in shard._asdict().items()})
        listed.append({"file": name, "count": len(shard.labels), **files.write(directory / name, data)})
        channels_first = shard.latents.double().movedim(1, 0).flatten(1)  # (C, N h w)
        total, squares = total + channels_first.sum(1), squares + channels_first.square().sum(1)
        values, count = values + channels_first.shape[1], count + len(shard.labels)
        shape = list(shard.latents.shape[1:])
    mean = total / values
    index = {
        "format": FORMAT,
        **description,
        "num_images": count,
        "latent_shape": shape,
        "mean": mean.tolist(),
        "std": (squares / values - mean.square()).clamp(min=0).sqrt().tolist(),
        "shards": listed,
    }
    files.replace(directory / "index.json", files.to_json(index))


class LatentDataset(Dataset):
    """Reads latents from memory-mapped shards: ``dataset[i] -> (latent (C, h, w), label)``, normalised,
    float32.

    Args:
        directory: where ``index.json`` lies.

    Raises:
        DataError: where the index or a shard is missing, has another size, or is not ours.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "index.json"
        try:
            self.index = json.loads(path.read_bytes())
            self.class_names: list[str] = self.index["class_names"]
            self.latent_shape: tuple[int, ...] = tuple(self.index["latent_shape"])
            self.mean, self.std = self.index["mean"], self.index["std"]
            self._ends = list(itertools.accumulate(shard["count"] for shard in self.index["shards"]))
        except FileNotFoundError:
            raise DataError(f"there are no latents in {self.directory}: {path} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not an index of latents: {error!r}") from error
        for shard in self.index["shards"]:
            file = self.directory / shard["file"]
            if file.parent != self.directory or not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise DataError(
                    f"{file} is missing or not the {shard['bytes']} bytes long that the index says"
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.read(i)

    def read(self, i: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Image i, or its mirror image."""
        number = bisect.bisect_right(self._ends, i)
        row = i - (self._ends[number - 1] if number else 0)
        shard = self._shards[number]
        latent = shard.get_slice("latents_flip" if mirrored else "latents")[row : row + 1].float()
        return normalize(latent, self.mean, self.std)[0], int(shard.get_slice("labels")[row])

    @cached_property
    def _shards(self) -> list[Any]:
        return [safe_open(self.directory / shard["file"], "pt") for shard in self.index["shards"]]

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the files itself
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}

    @property
    def vae_path(self) -> str:
        """The VAE's hub id, or its folder: a relative one is relative to the latents."""
        local = self.directory / self.index["vae"]
        return str(local.resolve()) if local.is_dir() else self.index["vae"]
