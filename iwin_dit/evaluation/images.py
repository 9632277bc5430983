"""Sets of images that metrics compare: folders, ADM's ``.npz`` files, and samples that are drawn on demand.

Each has a length, ``read(start, stop) -> (n, 3, H, W)`` uint8, a ``fingerprint`` of its content and a
``description`` for the result.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.images import decode_image
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.seeds import generator

DRAW_BATCH = 32
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# what zipfile and numpy raise for files that are not whole, encrypted, no .npz, or hold objects
BROKEN_NPZ = (
    OSError,
    KeyError,
    TypeError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class Images(Protocol):
    """A set of images of one size."""

    fingerprint: str
    description: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, H, W)``."""


class FolderImages:
    """All images below a folder, in the order of their paths; hidden ones are left out.

    Raises:
        DataError: where there are none, or one cannot be read or has another size than the first.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in EXTENSIONS
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if not self.paths:
            raise DataError(
                f"there are no images in {folder}; expected files such as {', '.join(EXTENSIONS)}"
            )
        self.description = {"folder": str(folder), "images": len(self)}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> Tensor:
        images = [pil_to_tensor(decode_image(_read(path), str(path))) for path in self.paths[start:stop]]
        first = self._size
        for path, image in zip(self.paths[start:stop], images, strict=True):
            if image.shape[1:] != first:
                raise DataError(
                    f"{path} has {image.shape[2]} x {image.shape[1]} pixels, {self.paths[0]} has "
                    f"{first[1]} x {first[0]}; a metric compares images of one size"
                )
        return torch.stack(images)

    @cached_property
    def _size(self) -> torch.Size:
        return pil_to_tensor(decode_image(_read(self.paths[0]), str(self.paths[0]))).shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(path.relative_to(self.folder)))
            digest.update(hashlib.sha256(_read(path)).digest())
        return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore or remove it") from None


class NpzImages:
    """The array ``arr_0`` of an ``.npz`` file, uint8 ``(N, H, W, 3)``, as ADM's evaluator takes it.

    It is read piece by piece; objects in it are refused, not unpickled.

    Raises:
        DataError: where there is no such array.
    """

    what, axes = "images", ("height", "width")

    def __init__(self, path: Path):
        self.path = path
        try:
            with self._open() as file:
                self.shape, fortran, dtype = _npy_header(file)
                self._start = file.tell()
        except BROKEN_NPZ as error:
            raise DataError(f"{path} is no .npz with {self.what} in arr_0: {error}") from None
        fits = len(self.shape) == len(self.axes) + 2 and self.shape[-1] == 3 and 0 not in self.shape
        if dtype != np.uint8 or fortran or not fits:
            raise DataError(
                f"{path} holds {dtype} of shape {self.shape} in arr_0, expected uint8 "
                f"(N, {', '.join(self.axes)}, 3) in C order"
            )
        self.description = {"npz": str(path), self.what: len(self)}

    def _open(self) -> Any:
        return zipfile.ZipFile(self.path).open("arr_0.npy")

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        size = int(np.prod(self.shape[1:]))
        try:
            with self._open() as file:
                file.seek(self._start + start * size)
                data = file.read((stop - start) * size)
        except BROKEN_NPZ as error:
            raise DataError(f"{self.path} is broken at image {start} or after it: {error}") from None
        if len(data) != (stop - start) * size:
            raise DataError(f"{self.path} ends within image {start + len(data) // size}; get it again")
        images = np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])
        return torch.from_numpy(images.copy()).movedim(-1, 1).contiguous()

    @cached_property
    def fingerprint(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class SampledImages:
    """What a pipeline draws: image i is of class ``plan(i)``, from a seed of its own.

    Args:
        draw: ``draw(labels, generators) -> (n, 3, H, W)`` uint8, rounded as a saved PNG is.
        labels: of the images; see :func:`label_plan`.
        seed: with the label and its number among those of the class, of the noise.
        recipe: all that the images depend on, for the fingerprint and the result.
        draw_batch: images that are drawn together, in groups that do not depend on what is read: in float32
            the rounding of a matrix product depends on the batch, and with it a pixel in 10^5.
    """

    def __init__(
        self,
        draw: Callable[[list[int], list[torch.Generator]], Tensor],
        labels: Sequence[int],
        seed: int,
        recipe: dict[str, Any],
        draw_batch: int = DRAW_BATCH,
    ):
        self.draw, self.labels, self.seed, self.draw_batch = draw, list(labels), seed, draw_batch
        self._group: tuple[int, Tensor] | None = None  # the last one: its number and its images
        seen: dict[int, int] = {}
        self.numbers = []
        for label in self.labels:
            self.numbers.append(seen.get(label, 0))
            seen[label] = self.numbers[-1] + 1
        self.description = recipe | {"images": len(self), "seed": seed, "draw_batch": draw_batch}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> Tensor:
        size = self.draw_batch
        groups = [self._draw(group) for group in range(start // size, -(-stop // size))]
        first = start // size * size
        return torch.cat(groups)[start - first : stop - first]

    def _draw(self, group: int) -> Tensor:
        if self._group is None or self._group[0] != group:
            start = group * self.draw_batch
            self._group = group, self._draw_range(start, min(start + self.draw_batch, len(self)))
        return self._group[1]

    def _draw_range(self, start: int, stop: int) -> Tensor:
        labels = self.labels[start:stop]
        seeds = [
            generator(self.seed, "image", label, number)
            for label, number in zip(labels, self.numbers[start:stop], strict=True)
        ]
        return self.draw(labels, seeds)

    @cached_property
    def fingerprint(self) -> str:
        content = repr((sorted(self.description.items(), key=str), self.labels))
        return hashlib.sha256(content.encode()).hexdigest()


def label_plan(plan: str, num_images: int, num_classes: int, seed: int) -> list[int]:
    """The class of each image.

    Args:
        plan: ``equal``: the classes in turn, so that each has as many; ``uniform``: drawn at random.

    Raises:
        ConfigError: where it is empty.
    """
    if num_images < 1 or num_classes < 1:
        raise ConfigError(
            f"there is nothing to draw: {num_images} images of {num_classes} classes; each must be 1 or more"
        )
    if plan == "equal":
        return [i % num_classes for i in range(num_images)]
    return torch.randint(num_classes, (num_images,), generator=generator(seed, "labels")).tolist()


def open_images(location: str) -> FolderImages | NpzImages:
    """A folder, or an ``.npz`` file.

    Raises:
        DataError: where it is neither.
    """
    path = Path(location)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise DataError(f"{location} is neither a folder of images nor an .npz file")
