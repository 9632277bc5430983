"""Clips: read from video files and folders of frames that strangers made, and written for people to look at.

A clip is a list of frames, RGB images of 8 bits and of one size. Video files need the optional package PyAV;
folders of frames and writing a GIF do not.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import GifImagePlugin, Image

from iwin_dit.data.folders import IMAGES, Folder, Wanted, read_file
from iwin_dit.data.images import BadImage, decode_image
from iwin_dit.data.video_files import EXTENSIONS, VideoFile, check_memory, pyav
from iwin_dit.runtime import files
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import printable

# What a folder of clips holds: frames are images, but a GIF is a video.
FRAMES = Wanted(IMAGES.endings - set(EXTENSIONS), IMAGES.formats - {"GIF"})
VIDEOS = Wanted(frozenset(EXTENSIONS), frozenset())  # by the ending alone, which tells FFmpeg the format
CLIPS = Wanted(FRAMES.endings | VIDEOS.endings, FRAMES.formats)
CRF = 17  # of H.264, on its scale from 0 to 51: hard to tell from the original


class ClipSpec(NamedTuple):
    """Which frames make a clip: ``frames`` of them, every ``stride``-th one of a video."""

    frames: int
    stride: int = 1

    @property
    def span(self) -> int:
        """Frames of the video from the clip's first to its last."""
        return (self.frames - 1) * self.stride + 1


def count_frames(path: str) -> int:
    """How many frames a video file or a folder of images has; a file is read through, but not decoded.

    Raises:
        DataError: where it cannot be read or PyAV is missing; :class:`BadImage` where it is broken.
    """
    return len(_open(path))


def read_frames(path: str, indices: Sequence[int]) -> list[Image.Image]:
    """Some frames of a video file or a folder of images, upright.

    Args:
        path: a file with one of ``EXTENSIONS``, or a folder, with its frames in the order of their names.
        indices: which, ascending, counted from 0 in the order in which they are shown.

    Raises:
        DataError: as of :func:`count_frames`; :class:`BadImage` also where a frame is not there, cannot be
            decoded or has another size than the first.
    """
    return _pick(_open(path), indices)


def choose_clip(
    path: str, spec: ClipSpec, rng: torch.Generator, background: Colour | None = None
) -> list[Image.Image]:
    """A clip from a place of the video that is drawn from ``rng``.

    ``background`` shows through transparent pixels of GIFs and of folders of frames; with None it is black.

    Raises:
        DataError: as of :func:`read_frames`; :class:`BadImage` also where the video is too short.
    """
    video = _open(path)
    start = int(torch.randint(_places(video, spec), (), generator=rng))
    return _pick(video, _indices(start, spec), background)


def spread_clips(
    path: str, spec: ClipSpec, number: int, background: Colour | None = None
) -> list[list[Image.Image]]:
    """``number`` clips from the first place to the last, evenly spread; one comes from the middle.

    ``background`` and errors are those of :func:`choose_clip`.
    """
    video = _open(path)
    last = _places(video, spec) - 1
    starts = [last * k // (number - 1) for k in range(number)] if number > 1 else [last // 2]
    clips = [_indices(start, spec) for start in starts]
    indices = sorted(set().union(*clips))
    frames = dict(zip(indices, _pick(video, indices, background), strict=True))
    return [[frames[i] for i in clip] for clip in clips]


def write_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Replaces ``path`` by the frames, all of one size, as H.264, or as MPEG-4 where FFmpeg lacks x264.

    Odd sides, which these cannot have, grow by repeating the last row or column.

    Raises:
        DataError: where PyAV is missing.
    """
    av = pyav(str(path))
    is_x264 = "libx264" in av.codecs_available
    pixels = [np.asarray(frame.convert("RGB")) for frame in frames]
    height, width = pixels[0].shape[:2]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264" if is_x264 else "mpeg4",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": str(CRF)} if is_x264 else {"qmin": "2", "qmax": "2"},
        )
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for frame in pixels:
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
    files.replace(path, file.getvalue())


def write_gif(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Replaces ``path`` by the frames, each with the 256 colours that suit it best, undithered, in a loop."""
    images = [frame.convert("RGB").quantize(dither=Image.Dither.NONE) for frame in frames]
    # A GIF counts hundredths of a second, and viewers slow down what is shown for less than two.
    ends = [round(100 * k / fps) for k in range(len(images) + 1)]
    parts = [*GifImagePlugin.getheader(images[0], info={"loop": 0})[0]]
    for image, start, end in zip(images, ends, ends[1:], strict=False):
        # Frame by frame, since Image.save would make one frame of equal neighbours.
        duration = 10 * max(end - start, 2)
        parts += GifImagePlugin.getdata(image, duration=duration, include_color_table=True)
    files.replace(path, b"".join([*parts, b";"]))


def frame_names(folder: str) -> list[str]:
    """The images that a folder directly holds, in the order of their names; hidden ones are left out.

    Raises:
        DataError: where the folder cannot be read; :class:`BadImage` where it has no images, or names put
            frame 10 before frame 2.
    """
    with Folder(folder, FRAMES, follow_links=True) as listed:  # links were looked at when it was found
        names = listed.files()
    if not names:
        raise BadImage(f"{printable(folder)} holds no images; expected the frames of a clip, or remove it")
    check_numbers(folder, names)
    return names


def check_numbers(folder: str, names: list[str]) -> None:
    """That frames in the order of their names are so in the order of the numbers in them, too.

    Raises:
        BadImage: where names put frame 10 before frame 2.
    """

    def key(name: str) -> list[str | int]:
        return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"([0-9]+)", name))]

    for name, by_number in zip(names, sorted(names, key=key), strict=True):
        if name != by_number:
            raise BadImage(
                f"{printable(os.path.join(folder, name))} comes before {printable(by_number)} in the order "
                "of names, not of numbers; number frames with leading zeros"
            )


class _Folder:
    """A folder of images, a frame each."""

    def __init__(self, path: str):
        self.path = path
        self._names = frame_names(path)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return printable(os.path.join(self.path, self._names[i]))

    def read(self, indices: Sequence[int], background: Colour | None = None) -> dict[int, Image.Image]:
        frames: dict[int, Image.Image] = {}
        pixels = 0
        for i in indices:
            data = read_file(os.path.join(self.path, self._names[i]))
            frames[i] = decode_image(data, self.name(i), background=background)
            pixels += frames[i].width * frames[i].height
            check_memory(printable(self.path), len(indices), pixels)
        return frames


def _open(path: str) -> _Folder | VideoFile:
    return _Folder(path) if os.path.isdir(path) else VideoFile(path)


def _places(video: _Folder | VideoFile, spec: ClipSpec) -> int:
    """The number of places where a clip can start."""
    places = len(video) - spec.span + 1
    if places < 1:
        raise BadImage(
            f"{printable(video.path)} has {len(video)} frames, a clip of {spec.frames} frames with stride "
            f"{spec.stride} takes {spec.span}; ask for fewer frames or a smaller stride, or remove it"
        )
    return places


def _indices(start: int, spec: ClipSpec) -> range:
    return range(start, start + spec.span, spec.stride)


def _pick(
    video: _Folder | VideoFile, indices: Sequence[int], background: Colour | None = None
) -> list[Image.Image]:
    """Some frames of a video, of one size."""
    beyond = [i for i in indices if not 0 <= i < len(video)]
    if beyond:
        raise BadImage(f"{printable(video.path)} has {len(video)} frames; frame {beyond[0]} is not there")
    frames = video.read(indices, background) if len(indices) else {}
    for i in indices:
        if i not in frames:
            raise BadImage(f"{video.name(i)} cannot be decoded; restore or remove the video")
        first, frame = frames[indices[0]], frames[i]
        if frame.size != first.size:
            raise BadImage(
                f"{video.name(i)} is {frame.width} x {frame.height} pixels large, {video.name(indices[0])} "
                f"{first.width} x {first.height}; frames of a clip have one size, so resize or remove it"
            )
    return [frames[i] for i in indices]
