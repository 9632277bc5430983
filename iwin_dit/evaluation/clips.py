"""Sets of clips that metrics compare, with the protocol of :class:`iwin_dit.evaluation.images.Images`.

Each has a length, ``read(start, stop) -> (n, 3, T, H, W)`` uint8, a ``fingerprint`` of its content and a
``description`` for the result. With an extractor of clips, ``extractor(uint8 clips) -> {layer: (B, D)}``,
they go where sets of images go.

Legend: N clips, T frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.video import EXTENSIONS, check_numbers, count_frames, read_frames
from iwin_dit.evaluation.images import FolderImages, NpzImages
from iwin_dit.runtime import files
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
            check_numbers(str(clip[0].parent), [frame.name for frame in clip])
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


class VideoClips:
    """All video files below a folder, in the order of their paths; hidden ones are left out.

    Each file is a clip, from its first frame to its last.

    Raises:
        DataError: where two files are the same clip; one cannot be read, or has another number of frames or
            another size than the first.
    """

    def __init__(self, folder: Path):
        self.folder, self.paths = folder, _videos(folder)
        for one, two in pairwise(sorted(self.paths, key=lambda path: path.with_suffix(""))):
            if one.with_suffix("") == two.with_suffix(""):
                raise DataError(f"{one} and {two.name} are one clip twice; give a folder with one of each")
        self.num_frames = count_frames(str(self.paths[0]))
        self.description = {"folder": str(folder), "clips": len(self.paths), "frames": self.num_frames}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> Tensor:
        """Some of them, in order: uint8 ``(stop - start, 3, T, H, W)``."""
        return torch.stack([self._read(path) for path in self.paths[start:stop]])

    def _read(self, path: Path) -> Tensor:
        if (found := count_frames(str(path))) != self.num_frames:
            raise DataError(
                f"{path} has {found} frames, {self.paths[0]} has {self.num_frames}; a metric compares clips "
                "of one length"
            )
        frames = read_frames(str(path), range(self.num_frames))
        if frames[0].size != self._size:
            raise DataError(
                f"{path} has {frames[0].width} x {frames[0].height} pixels, {self.paths[0]} has "
                f"{self._size[0]} x {self._size[1]}; a metric compares clips of one size"
            )
        return torch.stack([pil_to_tensor(frame) for frame in frames], 1)

    @cached_property
    def _size(self) -> tuple[int, int]:
        return read_frames(str(self.paths[0]), [0])[0].size

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(path.relative_to(self.folder)))
            digest.update(files.fingerprint(path)["sha256"].encode())
        return digest.hexdigest()


def _videos(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


class NpzClips(NpzImages):
    """The array ``arr_0`` of an ``.npz`` file, uint8 ``(N, T, H, W, 3)``, read piece by piece."""

    what, axes = "clips", ("frames", "height", "width")

    def __init__(self, path: Path):
        super().__init__(path)
        self.description["frames"] = self.shape[1]


def open_clips(location: str) -> FolderClips | VideoClips | NpzClips:
    """A folder of video files or of folders of frames, or an ``.npz`` file.

    Raises:
        DataError: where it is neither.
    """
    path = Path(location)
    if path.is_dir():
        return VideoClips(path) if _videos(path) else FolderClips(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzClips(path)
    raise DataError(
        f"{location} is neither a folder of clips, each a video file or a folder of frames, nor an .npz file"
    )
