"""Sets of clips that metrics compare, with the protocol of :class:`iwin_dit.evaluation.images.Images`.

Each has a length, ``read(start, stop) -> (n, 3, T, H, W)`` uint8, a ``fingerprint`` of its content and a
``description`` for the result. With an extractor of clips, ``extractor(uint8 clips) -> {layer: (B, D)}``,
they go where sets of images go.

Legend: N clips, T frames, H x W pixels.
"""

from __future__ import annotations

import re
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from torch import Tensor

from iwin_dit.evaluation.images import FolderImages, NpzImages
from iwin_dit.runtime.errors import DataError


class FolderClips:
    """All clips below a folder, in the order of their paths; hidden ones are left out.

    A clip is a folder that directly holds images, its frames in the order of their names.

    Raises:
        DataError: where there are none; one has another number of frames or another size than the first; a
            frame cannot be read; or names put frame 10 before frame 2.
    """

    def __init__(self, folder: Path):
        self._images = FolderImages(folder)
        self._images.paths.sort(key=lambda path: (path.parent, path.name))  # those of a clip side by side
        clips = [list(frames) for _, frames in groupby(self._images.paths, attrgetter("parent"))]
        self.num_clips, self.num_frames = len(clips), len(clips[0])
        for clip in clips:
            if len(clip) != self.num_frames:
                raise DataError(
                    f"{clip[0].parent} has {len(clip)} frames, {clips[0][0].parent} has {self.num_frames}; "
                    "a metric compares clips of one length"
                )
            for frame, following in zip(clip, sorted(clip, key=_by_number), strict=True):
                if frame != following:
                    raise DataError(
                        f"{frame} comes before {following.name} in the order of names, not of numbers; "
                        "number frames with leading zeros"
                    )
        self.description = {"folder": str(folder), "clips": self.num_clips, "frames": self.num_frames}

    def __len__(self) -> int:
        return self.num_clips

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, T, H, W)``."""
        frames = self._images.read(start * self.num_frames, stop * self.num_frames)
        return frames.unflatten(0, (-1, self.num_frames)).movedim(1, 2).contiguous()

    @property
    def fingerprint(self) -> str:
        return self._images.fingerprint


def _by_number(path: Path) -> list[str | int]:
    """Sorts frame2 before frame10."""
    parts: list[str | int] = list(re.split(r"(\d+)", path.name))
    parts[1::2] = map(int, parts[1::2])
    return parts


class NpzClips(NpzImages):
    """The array ``arr_0`` of an ``.npz`` file, uint8 ``(N, T, H, W, 3)``, read piece by piece."""

    what, axes = "clips", ("frames", "height", "width")

    def __init__(self, path: Path):
        super().__init__(path)
        self.description["frames"] = self.shape[1]


def open_clips(location: str) -> FolderClips | NpzClips:
    """A folder of folders of frames, or an ``.npz`` file.

    Raises:
        DataError: where it is neither.
    """
    path = Path(location)
    if path.is_dir():
        return FolderClips(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzClips(path)
    raise DataError(f"{location} is neither a folder of clips, each a folder of frames, nor an .npz file")
