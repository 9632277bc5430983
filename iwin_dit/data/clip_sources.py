"""Where clips come from: class folders of video files and of folders of frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from iwin_dit.data.folders import Folder
from iwin_dit.data.packed_sources import stamped
from iwin_dit.data.sources import Files, by_class
from iwin_dit.data.video import (
    CLIPS,
    EXTENSIONS,
    FRAMES,
    ClipSpec,
    check_numbers,
    choose_clip,
    frame_names,
    spread_clips,
)
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import DataError, printable


class ClipFolderSource(Files):
    """A folder per class, with video files and folders of frames below it at any depth, in sorted order.

    A folder that directly holds images is one clip, its frames in the order of their names. What is taken
    and which links count is the rule of :mod:`iwin_dit.data.folders`. No file stays open, so that this can be
    sent to worker processes.

    Raises:
        DataError: where there are no clips; a class has none; a link may not be followed; images lie in a
            class folder or beside videos; or names put frame 10 before frame 2.
    """

    def __init__(self, root: str | Path, follow_links: bool = False, order: Sequence[str] | None = None):
        expected = (
            f"CLIP with {' '.join(EXTENSIONS)}, or frames CLASS/CLIP/FRAME with "
            f"{' '.join(sorted(FRAMES.endings))}"
        )
        with Folder(root, CLIPS, follow_links) as folder:
            below = partial(_clips_below, folder)
            self.class_names, self._paths, self.labels = by_class(folder, below, "clips", expected, order)
        self.root, self.ignored = folder.root, folder.ignored

    def stamp(self, i: int) -> tuple[str, int]:
        """Label, sizes and names of clip i's files, without reading them; and when the last was modified."""
        clip, path = self._paths[i], self.path(i)
        files = [os.path.join(clip, name) for name in frame_names(path)] if os.path.isdir(path) else [clip]
        stamps = [stamped(self.root, file) for file in files]
        return f"{self.labels[i]} {' '.join(found for found, _ in stamps)}", max(time for _, time in stamps)

    def read(
        self, i: int, spec: ClipSpec, rng: torch.Generator | None, background: Colour | None = None
    ) -> tuple[list[Image.Image], int]:
        """Frames, from a place drawn from ``rng`` or without one from the middle, and the label.

        Raises:
            DataError: as of :func:`iwin_dit.data.video.choose_clip`.
        """
        return choose_clip(self.path(i), spec, rng, background), self.labels[i]

    def views(
        self, i: int, spec: ClipSpec, number: int, background: Colour | None = None
    ) -> tuple[list[list[Image.Image]], int]:
        """``number`` clips that are evenly spread over the video, and the label.

        Raises:
            DataError: as of :func:`iwin_dit.data.video.spread_clips`.
        """
        return spread_clips(self.path(i), spec, number, background), self.labels[i]


def _clips_below(root: Folder, class_folder: str) -> list[str]:
    """Paths of clips, relative to the root: by folder, then by name."""
    clips: list[str] = []
    for folder, group in groupby(root.files_below(class_folder), os.path.dirname):
        files = list(group)
        videos = [file for file in files if file.lower().endswith(EXTENSIONS)]
        if len(videos) == len(files):
            clips += videos
            continue
        path = os.path.join(root.root, folder)
        if videos or folder == class_folder:
            where = "beside videos" if videos else "directly in a class folder"
            raise DataError(
                f"{printable(path)} has images {where}; expected a folder of its own for a clip's frames, "
                f"{root.root}/CLASS/CLIP/FRAME"
            )
        check_numbers(path, [os.path.basename(file) for file in files])
        clips.append(folder)
    return clips
