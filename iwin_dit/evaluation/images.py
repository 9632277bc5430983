"""Sets of images that metrics compare: folders, ADM's ``.npz`` files, and samples that are drawn on demand.

Each has a length, ``read(start, stop) -> (n, 3, H, W)`` uint8, a ``fingerprint`` of its content and a
``description`` for the result. To learn the fingerprint of stored images, all are looked at: so one that is
broken or has another size is found before anything is computed.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.folders import ignored_line, list_files
from iwin_dit.data.formats import IMAGES, Wanted
from iwin_dit.data.images import center_crop, decode_image, read_header
from iwin_dit.data.sources import open_source
from iwin_dit.runtime import files
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.progress import progress, say
from iwin_dit.runtime.seeds import generator
from iwin_dit.runtime.workers import worker_errors

DRAW_BATCH = 32
LOOK_FILES = 64  # looked at together
READ_SECONDS = 600  # a batch that takes longer to read is an error


class Images(Protocol):
    """A set of images of one size.

    workers: processes that read it ahead; 0 for what is drawn.
    """

    description: dict[str, Any]
    workers: int

    @property
    def fingerprint(self) -> str:
        """Of the content."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, H, W)``."""


class Extractor(nn.Module):
    """A network whose features metrics compare: uint8 images or clips to ``{layer: (B, D)}``.

    sha256: of its weights.
    """

    name: str
    sha256: str
    preprocessing: str
    layers: tuple[str, ...]


class Reading(NamedTuple):
    """How stored images are read.

    size: (H, W) that images of folders are cropped to, by ADM's centre crop. Default: all have one size.
    background: what shows through transparent pixels; see :func:`iwin_dit.data.images.decode_image`.
    follow_links: links may lead out of a folder.
    workers: processes that read.
    """

    size: tuple[int, int] | None = None
    background: Colour | None = None
    follow_links: bool = False
    workers: int = 0


AS_THEY_ARE = Reading()


class _Calls(Dataset):
    """``call(*arguments)`` for each of the arguments, in the processes of a DataLoader."""

    def __init__(self, call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]):
        self.call, self.arguments = call, arguments

    def __len__(self) -> int:
        return len(self.arguments)

    def __getitem__(self, i: int) -> Any:
        return self.call(*self.arguments[i])


def in_order(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Results in order, from worker processes with a time limit; of a single call without these.

    Raises:
        WorkerError: where a process dies, or a call takes longer than :data:`READ_SECONDS`.
    """
    workers = min(workers, len(arguments) - 1)
    timeout = READ_SECONDS if workers > 0 else 0
    with worker_errors("lower --workers", ""):
        calls = _Calls(call, arguments)
        yield from DataLoader(calls, batch_size=None, num_workers=max(workers, 0), timeout=timeout)


def read_batches(images: Images, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Images ``[start, stop)`` of each range, read ahead by the set's workers.

    Raises:
        DataError, WorkerError: where they cannot be read.
    """
    return in_order(images.read, ranges, images.workers)


class StoredImages(ABC):
    """Encoded images, each cropped or of the size of the first.

    Args:
        place: where they lie, for messages.
    """

    def __init__(self, place: str, reading: Reading):
        self.place, self.reading, self.workers = place, reading, reading.workers
        self.description: dict[str, Any] = {}
        if reading.size is not None:
            self.description["center_crop"] = list(reading.size)
        if reading.background is not None:
            self.description["background"] = list(reading.background)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, i: int) -> bytes:
        """Image i as it is stored."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What to call image i in an error."""

    @abstractmethod
    def key(self, i: int) -> bytes:
        """The part of its name that belongs to the fingerprint."""

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, H, W)``."""
        images = []
        for i in range(start, stop):
            image = decode_image(self.encoded(i), self.name(i), background=self.reading.background)
            if self.reading.size is None:
                self._check_size(i, image.size)
                images.append(pil_to_tensor(image))
            else:
                images.append(center_crop(image, *self.reading.size))
        return torch.stack(images)

    def _check_size(self, i: int, size: tuple[int, int]) -> None:
        first = self._size
        if size != first:
            raise DataError(
                f"{self.name(i)} has {size[0]} x {size[1]} pixels, {self.name(0)} has {first[0]} x "
                f"{first[1]}; a metric compares images of one size: crop them with --size PIXELS"
            )

    @cached_property
    def _size(self) -> tuple[int, int]:
        return read_header(self.encoded(0), self.name(0)).size

    def _look(self, start: int, stop: int) -> tuple[list[bytes], int]:
        """The hash of each image, after a look at its header; how many have an alpha."""
        hashes, with_alpha = [], 0
        for i in range(start, stop):
            data = self.encoded(i)
            header = read_header(data, self.name(i))
            if self.reading.size is None:
                self._check_size(i, header.size)
            with_alpha += header.has_alpha
            hashes.append(hashlib.sha256(data).digest())
        return hashes, with_alpha

    @cached_property
    def fingerprint(self) -> str:
        """Of names and contents. All images are read, and their headers looked at.

        Raises:
            DataError: where an image cannot be read, or has another size than the first.
        """
        digest, with_alpha = hashlib.sha256(), 0
        _ = self._size  # before processes are started, which would each read it
        firsts = range(0, len(self), LOOK_FILES)
        ranges = [(first, min(first + LOOK_FILES, len(self))) for first in firsts]
        with progress(total=len(self), unit="image", desc=f"look at {self.place}", delay=3) as bar:
            looks = in_order(self._look, ranges, self.workers)
            for (start, stop), (hashes, alphas) in zip(ranges, looks, strict=True):
                with_alpha += alphas
                for i, found in zip(range(start, stop), hashes, strict=True):
                    digest.update(self.key(i))
                    digest.update(found)
                bar.update(stop - start)
        if with_alpha and self.reading.background is None:
            say(
                f"{with_alpha} of {len(self)} images in {self.place} have an alpha, which is dropped: "
                "where they are transparent, most become black; --background white sets a colour"
            )
        if self.reading.size is not None or self.reading.background is not None:
            digest.update(repr((self.reading.size, self.reading.background)).encode())
        return digest.hexdigest()


class FolderImages(StoredImages):
    """All images below a folder, in the order of their paths, as :mod:`iwin_dit.data.folders` lists them.

    Raises:
        DataError: where there are none, or one cannot be read or has another size than the first.
    """

    def __init__(self, folder: Path, reading: Reading = AS_THEY_ARE, wanted: Wanted = IMAGES):
        super().__init__(str(folder), reading)
        self.folder = folder
        listing = list_files(folder, wanted, reading.follow_links)
        self.paths = sorted(folder / name for name in listing.files)
        if line := ignored_line(str(folder), "images", listing.ignored):
            say(line)
        if not self.paths:
            raise DataError(
                f"there are no images in {folder}; expected files such as {', '.join(sorted(wanted.endings))}"
            )
        self.description = {"folder": str(folder), "images": len(self)} | self.description

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, i: int) -> bytes:
        return _read(self.paths[i])

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def key(self, i: int) -> bytes:
        return os.fsencode(self.paths[i].relative_to(self.folder))


class SourceImages(StoredImages):
    """The images of a source that training reads, without their labels: ``hf:NAME``, tar files and others."""

    def __init__(self, location: str, reading: Reading = AS_THEY_ARE):
        super().__init__(location, reading)
        self.source = open_source(location, follow_links=reading.follow_links)
        self.description = {"source": location, "images": len(self)} | self.description

    def __len__(self) -> int:
        return len(self.source)

    def encoded(self, i: int) -> bytes:
        return self.source.read(i)[0]

    def name(self, i: int) -> str:
        return self.source.name(i)

    def key(self, i: int) -> bytes:
        return str(i).encode()


def _read(path: Path) -> bytes:
    try:
        return files.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore or remove it") from None


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
        self.workers = 0
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
