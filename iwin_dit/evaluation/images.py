"""Sets of images, or of clips, that metrics compare: what each of them is, and those in files.

Each has a length, ``read(start, stop) -> (n, 3, [T,] H, W)`` uint8, a ``fingerprint`` of its content and a
``description`` for the result. To learn the fingerprint of what is stored, all of it is looked at: so what is
broken or has another size is found before anything is computed.

Legend: T frames of a clip, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.folders import IMAGES, Wanted, ignored_line, list_files
from iwin_dit.data.images import center_crop, decode_image, read_header
from iwin_dit.data.packed_sources import read_file
from iwin_dit.data.sources import is_packed, open_source
from iwin_dit.data.video import FRAMES, VIDEOS, check_numbers, count_frames, read_frames
from iwin_dit.evaluation.archives import NpzClips, NpzImages
from iwin_dit.runtime import files
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.processes import worker_errors
from iwin_dit.runtime.progress import progress, say

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


def in_order(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """``call(*arguments)`` for each of the arguments, in order, such as ``images.read`` of ranges.

    Worker processes make the calls, with a time limit; a single call is made without these.

    Raises:
        WorkerError: where a process dies, or a call takes longer than :data:`READ_SECONDS`.
    """
    workers = max(min(workers, len(arguments) - 1), 0)
    timeout = READ_SECONDS if workers > 0 else 0
    calls: Any = arguments
    with worker_errors("lower --workers", ""):
        yield from DataLoader(
            calls, batch_size=None, collate_fn=partial(_called, call), num_workers=workers, timeout=timeout
        )


def _called(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return call(*arguments)


class FolderImages:
    """All images below a folder, in the order of their paths, as :mod:`iwin_dit.data.folders` lists them.

    Each is cropped, or has the size of the first.

    Raises:
        DataError: where there are none, or one cannot be read or has another size than the first.
    """

    what = "images"
    mend = ": crop them with --size PIXELS"  # those of several sizes
    look_files = 64  # looked at together

    def __init__(self, folder: Path, reading: Reading = AS_THEY_ARE, wanted: Wanted = IMAGES):
        listing = list_files(folder, wanted, reading.follow_links)
        self.folder, self.paths = folder, sorted(folder / name for name in listing.files)
        if line := ignored_line(str(folder), self.what, listing.ignored):
            say(line)
        if not self.paths:
            raise DataError(
                f"there are no {self.what} in {folder}; expected files such as "
                f"{', '.join(sorted(wanted.endings))}"
            )
        self._describe("folder", str(folder), reading)

    def _describe(self, kind: str, place: str, reading: Reading) -> None:
        self.place, self.reading, self.workers = place, reading, reading.workers
        self.description: dict[str, Any] = {kind: place, self.what: len(self)}
        if reading.size is not None:
            self.description["center_crop"] = list(reading.size)
        if reading.background is not None:
            self.description["background"] = list(reading.background)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """What to call one in an error."""
        return str(self.paths[i])

    def key(self, i: int) -> bytes:
        """The part of its name that belongs to the fingerprint."""
        return os.fsencode(self.paths[i].relative_to(self.folder))

    def encoded(self, i: int) -> bytes:
        """An image as it is stored."""
        return read_file(str(self.paths[i]))

    def pixels(self, i: int) -> Tensor:
        """One of them, uint8."""
        image = decode_image(self.encoded(i), self.name(i), background=self.reading.background)
        if self.reading.size is not None:
            return center_crop(image, *self.reading.size)
        self._check_size(i, image.size)
        return pil_to_tensor(image)

    def look(self, i: int) -> tuple[bytes, bool]:
        """The hash of one, after a look at its header; whether it has an alpha."""
        data = self.encoded(i)
        header = read_header(data, self.name(i))
        if self.reading.size is None:
            self._check_size(i, header.size)
        return hashlib.sha256(data).digest(), header.has_alpha

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, H, W)``."""
        return torch.stack([self.pixels(i) for i in range(start, stop)])

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Width and height of the first."""
        return read_header(self.encoded(0), self.name(0)).size

    def _check_size(self, i: int, size: tuple[int, int]) -> None:
        first = self._size
        if size != first:
            raise DataError(
                f"{self.name(i)} has {size[0]} x {size[1]} pixels, {self.name(0)} has {first[0]} x "
                f"{first[1]}; a metric compares {self.what} of one size{self.mend}"
            )

    def _look(self, start: int, stop: int) -> list[tuple[bytes, bool]]:
        return [self.look(i) for i in range(start, stop)]

    @cached_property
    def fingerprint(self) -> str:
        """Of names and contents. All files are read, and looked at.

        Raises:
            DataError: where one cannot be read, or has another size than the first.
        """
        digest, with_alpha = hashlib.sha256(), 0
        _ = self._size  # before processes are started, which would each read it
        firsts = range(0, len(self), self.look_files)
        ranges = [(first, min(first + self.look_files, len(self))) for first in firsts]
        bar = progress(total=len(self), unit=self.what[:-1], desc=f"look at {self.place}", delay=3)
        with bar:
            found = chain.from_iterable(in_order(self._look, ranges, self.workers))
            for i, (content, has_alpha) in enumerate(found):
                digest.update(self.key(i))
                digest.update(content)
                with_alpha += has_alpha
                bar.update()
        if with_alpha and self.reading.background is None:
            say(
                f"{with_alpha} of {len(self)} images in {self.place} have an alpha, which is dropped: "
                "where they are transparent, most become black; --background white sets a colour"
            )
        if self.reading.size is not None or self.reading.background is not None:
            digest.update(repr((self.reading.size, self.reading.background)).encode())
        return digest.hexdigest()


class SourceImages(FolderImages):
    """The images of a source that training reads, without their labels: ``hf:NAME``, tar files and others."""

    def __init__(self, location: str, reading: Reading = AS_THEY_ARE):
        self.source = open_source(location, follow_links=reading.follow_links)
        self._describe("source", location, reading)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def key(self, i: int) -> bytes:
        return str(i).encode()

    def encoded(self, i: int) -> bytes:
        return self.source.read(i)[0]


class FolderClips:
    """All clips below a folder, in the order of their paths.

    A clip is a folder that directly holds images, its frames in the order of their names.

    Raises:
        DataError: where there are none; one has another number of frames or another size than the first; a
            frame cannot be read; or names put frame 10 before frame 2.
    """

    def __init__(self, folder: Path, reading: Reading = AS_THEY_ARE):
        self._images, self.workers = FolderImages(folder, reading, FRAMES), reading.workers
        self._images.paths.sort(key=lambda path: (path.parent, path.name))  # those of a clip side by side
        clips = [list(frames) for _, frames in groupby(self._images.paths, attrgetter("parent"))]
        self.num_clips, self.num_frames = len(clips), len(clips[0])
        for clip in clips:
            if len(clip) != self.num_frames:
                raise DataError(
                    f"{clip[0].parent} has {len(clip)} frames, {clips[0][0].parent} has {self.num_frames}; "
                    "a metric compares clips of one length"
                )
            check_numbers(str(clip[0].parent), [frame.name for frame in clip])
        self.description = self._images.description | {"clips": self.num_clips, "frames": self.num_frames}
        del self.description["images"]

    def __len__(self) -> int:
        return self.num_clips

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, T, H, W)``."""
        frames = self._images.read(start * self.num_frames, stop * self.num_frames)
        return frames.unflatten(0, (-1, self.num_frames)).movedim(1, 2).contiguous()

    @property
    def fingerprint(self) -> str:
        return self._images.fingerprint


class VideoClips(FolderImages):
    """All video files below a folder, in the order of their paths.

    Each file is a clip, from its first frame to its last.

    Raises:
        DataError: where two files are the same clip; one cannot be read, or has another number of frames or
            another size than the first.
    """

    what = "clips"
    mend = ""
    look_files = 1

    def __init__(self, folder: Path, reading: Reading = AS_THEY_ARE):
        super().__init__(folder, reading._replace(background=None), VIDEOS)
        for one, two in pairwise(sorted(self.paths, key=lambda path: path.with_suffix(""))):
            if one.with_suffix("") == two.with_suffix(""):
                raise DataError(f"{one} and {two.name} are one clip twice; give a folder with one of each")
        self.num_frames = self.description["frames"] = count_frames(self.name(0))

    @cached_property
    def _size(self) -> tuple[int, int]:
        return read_frames(self.name(0), [0])[0].size

    def pixels(self, i: int) -> Tensor:
        """A clip, uint8 ``(3, T, H, W)``."""
        self._check(i)
        frames = read_frames(self.name(i), range(self.num_frames))
        return torch.stack([pil_to_tensor(frame) for frame in frames], 1)

    def look(self, i: int) -> tuple[bytes, bool]:
        """The hash of a file, after its frames were counted and the first one was read."""
        self._check(i)
        return files.fingerprint(self.paths[i])["sha256"].encode(), False

    def _check(self, i: int) -> None:
        if (found := count_frames(self.name(i))) != self.num_frames:
            raise DataError(
                f"{self.name(i)} has {found} frames, {self.name(0)} has {self.num_frames}; a metric compares "
                "clips of one length"
            )
        self._check_size(i, read_frames(self.name(i), [0])[0].size)


def open_set(location: str, of_clips: bool, reading: Reading = AS_THEY_ARE) -> Images:
    """A set of clips or of images: a folder, an ``.npz`` file, or of images what training reads, ``hf:NAME``.

    All of it is looked at, so that one that is broken or has another size is found now.

    Raises:
        DataError: where it is neither, a folder holds none, or one of them cannot be used.
    """
    path, what = Path(location), "clips, each a video file or a folder of frames" if of_clips else "images"
    found: Images
    if path.suffix == ".npz" and path.is_file():
        found = (NpzClips if of_clips else NpzImages)(path, reading.workers)
    elif is_packed(location) and not of_clips:
        found = SourceImages(location, reading)
    elif not path.is_dir():
        raise DataError(f"{location} is neither a folder of {what}, nor an .npz file")
    elif not of_clips:
        found = FolderImages(path, reading)
    elif not list_files(path, VIDEOS, reading.follow_links).files:
        found = FolderClips(path, reading)
    elif reading.size is not None:
        raise DataError(f"--size crops images of folders, {location} holds videos; leave it out")
    else:
        found = VideoClips(path, reading)
    _ = found.fingerprint
    return found
