"""One latent shard: a safetensors file of which single rows are read.

By pread, not a memory map: the process's memory stays flat, and a file that shrinks is an error, no SIGBUS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import DataError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


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
                if not 2 <= header_bytes <= limits.HEADER_BYTES:
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

    def all(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self.entries[name]
        values = np.empty(entry.row_bytes * entry.shape[0], np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            read = 0
            while read < len(values) and (count := file.readinto(values[read:])):
                read += count
        if read != len(values):
            raise DataError(
                f"{self.path} ended after {read} of the {len(values)} bytes of {name}: it was cut short"
            )
        return torch.from_numpy(values).view(entry.dtype).reshape(entry.shape)

    @property
    def descriptor(self) -> int:
        """Of the open file."""
        return self._file.fileno()

    @cached_property
    def _file(self) -> Any:
        return open(self.path, "rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the file itself
        return {key: value for key, value in self.__dict__.items() if key != "_file"}


def read_rows(shards: Sequence[ShardFile], name: str, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Row ``rows[b]`` of shard ``numbers[b]``, for each b, as bytes: ``(B, row_bytes)``.

    Raises:
        DataError: where a file was cut short since it was opened.
    """
    size = shards[0].entries[name].row_bytes
    values = np.empty((len(rows), size), np.uint8)
    view = memoryview(values.reshape(-1))
    parts = [(view[start : start + size],) for start in range(0, values.size, size)]
    starts = np.array([shard.entries[name].start for shard in shards])[numbers] + rows * size
    descriptors = [shards[number].descriptor for number in numbers.tolist()]
    read = list(map(os.preadv, descriptors, parts, starts.tolist()))
    if set(read) - {size}:
        short = next(number for number, count in zip(numbers, read, strict=True) if count != size)
        raise DataError(f"{shards[short].path} ends within a latent: it was cut short since it was opened")
    return values
