"""Images and clips in ``.npz`` files, as ADM's evaluator takes them, read piece by piece."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, reason
from iwin_dit.runtime.progress import progress

# what zipfile and numpy raise for files that are not whole, encrypted, no .npz, or hold objects
BROKEN_NPZ = (
    OSError,
    KeyError,
    TypeError,
    ValueError,
    EOFError,
    RuntimeError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,  # of headers that are cut
    SyntaxError,
)
CHANNELS = 3
CHECK_BYTES = 16 * limits.MIB  # read at a time


class NpzImages:
    """The array ``arr_0`` of an ``.npz`` file, uint8 ``(N, H, W, 3)``, as ADM's evaluator takes it.

    Objects in it are refused, not unpickled. An array that is not compressed is read in place; a compressed
    one from its start to its end, which stays open from one piece to the next.

    Raises:
        DataError: where there is no such array.
    """

    what = "images"
    axes: tuple[str, ...] = ("height", "width")

    def __init__(self, path: Path, workers: int = 0):
        self.path, self.workers = path, workers
        self._opened: tuple[int, Any, int] | None = None
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                self.shape, fortran, dtype = npy_header(file)
                self._start = file.tell()
                promised, held = self._start + math.prod(self.shape), archive.getinfo("arr_0.npy").file_size
        except BROKEN_NPZ as error:
            raise DataError(f"{path} is no .npz with {self.what} in arr_0: {reason(error)}") from None
        fits = len(self.shape) == len(self.axes) + 2 and self.shape[-1] == CHANNELS and min(self.shape) > 0
        if dtype != np.uint8 or fortran or not fits:
            raise DataError(
                f"{path} holds {dtype} of shape {self.shape} in arr_0, expected uint8 "
                f"(N, {', '.join(self.axes)}, 3) in C order"
            )
        if promised != held:
            raise DataError(f"{path} promises {promised} bytes in arr_0 and holds {held}; get it again")
        if math.prod(self.shape[1:]) > limits.IMAGE_BYTES:
            raise DataError(
                f"{path} holds {self.what} of shape {self.shape[1:]}, more than "
                f"{files.in_units(limits.IMAGE_BYTES)} each; make smaller ones"
            )
        self.description: dict[str, Any] = {"npz": str(path), self.what: len(self)}
        self.description |= dict(zip(self.axes[:-2], self.shape[1:], strict=False))  # how many frames

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, ..., H, W)``."""
        size = math.prod(self.shape[1:])
        try:
            file, offset = self._file()
            file.seek(offset + self._start + start * size)
            data = file.read((stop - start) * size)
        except BROKEN_NPZ as error:
            raise DataError(f"{self.path} is broken at image {start} or after it: {reason(error)}") from None
        if len(data) != (stop - start) * size:
            raise DataError(f"{self.path} ends within image {start + len(data) // size}; get it again")
        images = np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])
        return torch.from_numpy(images.copy()).movedim(-1, 1).contiguous()

    def _file(self) -> tuple[Any, int]:
        """The array's file, open in this process, and where the array begins in it."""
        if self._opened is None or self._opened[0] != os.getpid():  # of the process that forked this one
            archive = zipfile.ZipFile(self.path)
            about = archive.getinfo("arr_0.npy")
            file: Any = archive.open(about)
            offset = 0
            if about.compress_type == zipfile.ZIP_STORED:
                file = open(self.path, "rb")  # noqa: SIM115
                file.seek(
                    about.header_offset + 26
                )  # of the local header, which has 30 bytes, a name and more
                offset = about.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            self._opened = os.getpid(), file, offset
        return self._opened[1:]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @cached_property
    def fingerprint(self) -> str:
        """Of the file. The whole array is read, and its checksum compared.

        Raises:
            DataError: where it is broken.
        """
        total = math.prod(self.shape)
        with progress(total=total, unit="B", unit_scale=True, desc=f"look at {self.path}", delay=3) as bar:
            try:
                with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                    while data := file.read(CHECK_BYTES):
                        bar.update(len(data))
            except BROKEN_NPZ as error:
                at = max(bar.n // math.prod(self.shape[1:]), 0)
                raise DataError(f"{self.path} is broken at image {at} or after it: {reason(error)}") from None
        return files.fingerprint(self.path)["sha256"]


class NpzClips(NpzImages):
    """The array ``arr_0`` of an ``.npz`` file, uint8 ``(N, T, H, W, 3)``, read piece by piece."""

    what = "clips"
    axes = ("frames", "height", "width")


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an ``.npy`` file, which is left at the first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def array_names(path: Path) -> set[str]:
    """The names of an ``.npz`` file's arrays; none of what is no such file."""
    with contextlib.suppress(*BROKEN_NPZ), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}
    return set()


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers, of at most :data:`iwin_dit.runtime.limits.ARRAY_BYTES`, as float64.

    Raises:
        ValueError: where it is larger, or no array of real numbers; and what :data:`BROKEN_NPZ` names.
    """
    with archive.open(f"{name}.npy") as file:
        shape, _, dtype = npy_header(file)
    if dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {dtype}, expected real numbers")
    if any(side < 0 for side in shape) or (size := math.prod(shape) * 8) > limits.ARRAY_BYTES:
        raise ValueError(
            f"{name} has the shape {shape}, more than {files.in_units(limits.ARRAY_BYTES)} allow"
        )
    if (held := archive.getinfo(f"{name}.npy").file_size) > size + limits.HEADER_BYTES:
        raise ValueError(f"{name} of shape {shape} holds {held} bytes")
    with archive.open(f"{name}.npy") as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False), np.float64)
