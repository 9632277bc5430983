"""One latent shard: a safetensors file whose rows are gathered from a memory map."""

from __future__ import annotations

import json
import mmap
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iwin_dit.runtime.errors import DataError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
MAX_HEADER = 1 << 20  # a shard has half a dozen tensors


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))


class ShardFile:
    """Random rows of the tensors in a safetensors file.

    Raises:
        DataError: where the file is missing, truncated or no safetensors file of latents.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 2 <= header_bytes <= MAX_HEADER:
                    raise ValueError(f"its header would be {header_bytes} bytes long")
                header = json.loads(file.read(header_bytes))
                size = os.fstat(file.fileno()).st_size
            header.pop("__metadata__", None)
            self.entries = {key: self._entry(value, 8 + header_bytes) for key, value in header.items()}
            end = 8 + header_bytes + max(value["data_offsets"][1] for value in header.values())
        except FileNotFoundError:
            raise DataError(f"the shard {path} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a safetensors file: {error}") from None
        if size != end:
            raise DataError(f"{path} has {size} bytes, its header says {end}: it is truncated or damaged")

    @staticmethod
    def _entry(value: dict[str, Any], base: int) -> Entry:
        start, end = value["data_offsets"]
        entry = Entry(DTYPES[value["dtype"]], tuple(value["shape"]), base + start)
        if end - start != entry.row_bytes * entry.shape[0]:
            raise ValueError(f"a tensor of shape {entry.shape} does not fill its {end - start} bytes")
        return entry

    def rows(self, name: str, indices: np.ndarray, into: np.ndarray, positions: np.ndarray) -> None:
        """``into[positions] = tensor[indices]``, where ``into`` holds rows as bytes: ``(B, row_bytes)``."""
        entry = self.entries[name]
        into[positions] = self._bytes(entry).reshape(entry.shape[0], entry.row_bytes)[indices]

    def all(self, name: str) -> Tensor:
        """A copy of a whole tensor."""
        entry = self.entries[name]
        return torch.from_numpy(self._bytes(entry).copy()).view(entry.dtype).reshape(entry.shape)

    def release(self) -> None:
        """Gives the pages that were read back; the system's page cache keeps them."""
        if "_map" in self.__dict__:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _bytes(self, entry: Entry) -> np.ndarray:
        return np.frombuffer(self._map, np.uint8, entry.row_bytes * entry.shape[0], entry.start)

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:  # a worker process maps the file itself
        return {key: value for key, value in self.__dict__.items() if key != "_map"}
