"""One latent shard: a safetensors file of which single rows are read.

By pread, not a memory map: the process's memory stays flat, and a file that shrinks is an error, no SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iwin_dit.data.folders import refuse_pointer
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, StorageError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
CHECKSUMS = "crc32"  # a tensor (N, K) int64: of row n of the K tensors of latents
FEWEST_OPEN = 16


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


def _version(descriptor: int) -> tuple[int, int]:
    """Size and time of a file, which tell it from one that took its place later."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


class ShardFile:
    """Random rows of the tensors in a safetensors file.

    Raises:
        DataError: where the file is missing, truncated or no safetensors file of latents.
        StorageError: where it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            header, base, self.version = files.retry(lambda: _read_header(path))
            size, _ = self.version
            header.pop("__metadata__", None)
            self.entries = {name: _entry(name, value, base, size) for name, value in header.items()}
            if not self.entries:
                raise ValueError("it holds no tensors")
        except (FileNotFoundError, IsADirectoryError):
            raise DataError(f"the shard {path} does not exist") from None
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            refuse_pointer(str(path))
            raise DataError(f"{path} is not a safetensors file of latents: {error}") from None
        end = max(entry.start + entry.row_bytes * entry.shape[0] for entry in self.entries.values())
        if size != end:
            raise DataError(f"{path} has {size} bytes, its header says {end}: it is truncated or damaged")

    def all(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            DataError: where the file was cut short since it was opened.
            StorageError: where it cannot be read.
        """
        entry = self.entries[name]
        values = np.empty(entry.row_bytes * entry.shape[0], np.uint8)

        def read_values() -> int:
            with open(self.path, "rb") as file:
                file.seek(entry.start)
                return file.readinto(values.data)

        try:
            read = files.retry(read_values)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if read != len(values):
            raise DataError(
                f"{self.path} ended after {read} of the {len(values)} bytes of {name}: it was cut short"
            )
        return torch.from_numpy(values).view(entry.dtype).reshape(entry.shape)


def _read_header(path: Path) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """The header, where the tensors begin, and which file this is."""
    with open(path, "rb") as file:
        version = size, _ = _version(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(limits.HEADER_BYTES, size - 8):
            raise ValueError(f"its header would be {length} bytes long, of {size} of the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    return header, 8 + length, version


def _entry(name: str, value: Any, base: int, size: int) -> Entry:
    """A tensor, as the header describes it; all numbers are those of a stranger."""
    shape, offsets, kind = value["shape"], value["data_offsets"], value["dtype"]
    numbers = [*shape, *offsets]
    if any(type(number) is not int or not 0 <= number <= size for number in numbers) or len(offsets) != 2:
        raise ValueError(f"{name:.40} of shape {shape!s:.80} lies at {offsets!s:.80} of {size} bytes")
    if not shape or not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{name:.40} is {kind!s:.40} of shape {shape!s:.80}, expected rows of {[*DTYPES]}")
    entry, (start, end) = Entry(DTYPES[kind], tuple(shape), base + offsets[0]), offsets
    if end - start != entry.row_bytes * entry.shape[0] or base + end > size:
        raise ValueError(f"{name:.40} of shape {shape!s:.80} does not fill the bytes {start} to {end}")
    return entry


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be read: {error.strerror or error}; look at its storage, and run again"
    )


class OpenFiles:
    """Descriptors of shards that are read again and again: so many stay open, those used last.

    Args:
        most: default: half of what this process may open.
    """

    def __init__(self, most: int | None = None):
        self._given = most
        self._open: OrderedDict[tuple[Path, tuple[int, int]], int] = OrderedDict()

    @property
    def most(self) -> int:
        """How many may stay open, by the limit of this process as it is now."""
        if self._given is not None:
            return self._given
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(FEWEST_OPEN, (1 << 16 if soft == resource.RLIM_INFINITY else soft) // 2)

    def descriptor(self, shard: ShardFile) -> int:
        """Of the shard, opened where it is not open; valid until the next call.

        Raises:
            DataError: where another file has taken its place.
            OSError: where it cannot be opened.
        """
        key = shard.path, shard.version
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= self.most:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        if _version(descriptor) != shard.version:
            os.close(descriptor)
            raise DataError(f"{shard.path} was cut short or replaced since it was opened; start again")
        self._open[key] = descriptor
        return descriptor

    def close(self, shard: ShardFile) -> None:
        """Closes this shard, so that it will be opened anew."""
        if (found := self._open.pop((shard.path, shard.version), None)) is not None:
            os.close(found)


OPEN = OpenFiles()  # of this process; a forked worker inherits what is open, and goes on by itself


def read_rows(shards: Sequence[ShardFile], name: str, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Row ``rows[b]`` of shard ``numbers[b]``, for each b, as bytes: ``(B, row_bytes)``.

    Raises:
        DataError: where a file was cut short since it was opened.
        StorageError: where it cannot be read.
    """
    size = shards[0].entries[name].row_bytes
    values = np.empty((len(rows), size), np.uint8)
    view = values.reshape(-1).data
    for b, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
        shard = shards[number]
        part, start = (view[b * size : (b + 1) * size],), shard.entries[name].start + row * size
        try:
            read = os.preadv(OPEN.descriptor(shard), part, start)
        except OSError:
            read = _read_again(shard, part, start)
        if read != size:
            raise DataError(f"{shard.path} ends within a latent: it was cut short since it was opened")
    return values


def _read_again(shard: ShardFile, part: tuple[memoryview], start: int) -> int:
    def read() -> int:
        OPEN.close(shard)  # a stale handle stays stale
        return os.preadv(OPEN.descriptor(shard), part, start)

    try:
        return files.retry(read)
    except FileNotFoundError:
        raise DataError(f"the shard {shard.path} went away since it was opened; restore it") from None
    except OSError as error:
        raise _unreadable(shard.path, error) from None


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """CRC-32 of each row of K tensors ``(N, ...)``, of its bytes as they lie on disk: ``(N, K)`` int64."""
    rows = [tensor.contiguous().flatten(1).view(torch.uint8).numpy() for tensor in tensors]
    return torch.tensor([[zlib.crc32(row) for row in of_one] for of_one in rows]).T.contiguous()
