"""Sets of clips that metrics compare, with the protocol of :class:`iwin_dit.evaluation.images.Images`.

Each has a length, ``read(start, stop) -> (n, 3, T, H, W)`` uint8, a ``fingerprint`` of its content and a
``description`` for the result. With an extractor of clips, ``extractor(uint8 clips) -> {layer: (B, D)}``,
they go where sets of images go.

Legend: N clips, T frames, H x W pixels.
"""

from __future__ import annotations

from functools import cached_property
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.folders import list_files
from iwin_dit.data.sources import is_packed
from iwin_dit.data.video import FRAMES, VIDEOS, check_numbers, count_frames, read_frames
from iwin_dit.evaluation.archives import NpzClips, NpzImages
from iwin_dit.evaluation.images import AS_THEY_ARE, FolderImages, Images, Reading, SourceImages
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError


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
