"""Video files that strangers made, through PyAV: how many frames they have, and the wanted ones decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, BinaryIO

from PIL import Image

from iwin_dit.data.images import BadImage, to_rgb
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import DataError, printable

# FFmpeg would guess the format from the content, and a playlist named .mp4 can point anywhere.
FORMATS = {
    ".mp4": "mov",
    ".webm": "matroska",
    ".gif": "gif",
    ".avi": "avi",
    ".mkv": "matroska",
    ".mov": "mov",
    ".m4v": "mov",
}
EXTENSIONS = tuple(FORMATS)
WITH_ALPHA = ("bgra", "rgba", "argb", "abgr", "yuva420p", "yuva422p", "yuva444p", "pal8")  # formats of frames
GENERATE_TIMES = 1  # FFmpeg's AVFMT_FLAG_GENPTS, which PyAV sets; the times it makes up can be wrong
MATROSKA_SEGMENT = b"\x18\x53\x80\x67"  # holds all but the header; its size follows (RFC 8794, section 4)
UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class VideoFile:
    """A video file, read through once without decoding to learn when its frames are shown; none stays open.

    Raises:
        DataError: where it cannot be read or PyAV is missing; :class:`BadImage` where it is broken, too large
            or holds no video.
    """

    def __init__(self, path: str):
        self.path = path
        with _demuxed(path) as (container, stream):
            self._pixels = stream.codec_context.width * stream.codec_context.height  # of a frame
            shown = [(p.pts, p.is_keyframe, p.is_corrupt) for p in container.demux(stream) if _is_shown(p)]
        whole = sum(not is_corrupt for *_, is_corrupt in shown)
        if not shown or whole < len(shown):
            raise BadImage(f"{printable(path)} is cut off: it has {whole} whole frames; restore or remove it")
        times = [time for time, *_ in shown]
        # Where frames do not have a time each, only their order from the start can be trusted.
        self._is_timed = None not in times and len(set(times)) == len(times)
        self._times = sorted(times) if self._is_timed else list(range(len(times)))
        self._keys = [time for time, is_key, _ in shown if is_key] if self._is_timed else []

    def __len__(self) -> int:
        return len(self._times)

    def name(self, i: int) -> str:
        """What to call frame i in an error."""
        return f"{printable(self.path)}, frame {i}"

    def read(self, indices: Sequence[int], background: Colour | None = None) -> dict[int, Image.Image]:
        """Those of some frames that can be decoded, upright; decoding begins at the key frame before them.

        Raises:
            DataError: where the file cannot be read; :class:`BadImage` where it is broken, or the frames
                take too much memory together.
        """
        check_memory(printable(self.path), len(indices), len(indices) * self._pixels)
        wanted = {self._times[i]: i for i in indices}
        key = max((time for time in self._keys if time <= min(wanted)), default=self._times[0])
        frames = self._decode(wanted, key, background) if key > self._times[0] else {}
        # Some files call frames keys from which decoding takes a while to recover.
        return frames if len(frames) == len(wanted) else self._decode(wanted, None, background)

    def _decode(
        self, wanted: dict[int, int], start: int | None, background: Colour | None
    ) -> dict[int, Image.Image]:
        frames: dict[int, Image.Image] = {}
        pixels = 0
        with _demuxed(self.path) as (container, stream):
            if start is not None:
                container.seek(start, stream=stream)
            for order, frame in enumerate(container.decode(stream)):
                i = wanted.get(frame.pts if self._is_timed else order)
                if i is not None and not frame.is_corrupt:
                    frames[i] = _to_image(frame, background)
                    pixels += frame.width * frame.height
                    check_memory(printable(self.path), len(wanted), pixels)  # frames may outgrow the header
                if len(frames) == len(wanted):
                    break
        return frames


def check_memory(name: str, frames: int, pixels: int) -> None:
    """That the frames of a clip fit into memory together.

    Args:
        pixels: of all frames, each held in four bytes.

    Raises:
        BadImage: where they do not.
    """
    if 4 * pixels > limits.IMAGE_BYTES:
        raise BadImage(
            f"{name}: {frames} frames of a clip would take {files.in_units(4 * pixels)} of memory or more, "
            f"{files.in_units(limits.IMAGE_BYTES)} are allowed; scale the video down, or ask for fewer frames"
        )


def pyav(path: str) -> ModuleType:
    """The package PyAV.

    Raises:
        DataError: where it is missing, which ``path`` needs.
    """
    try:
        import av
    except ImportError:
        raise DataError(f"{path} needs a package: pip install 'iwin-dit[video]'") from None
    return av


@contextmanager
def _demuxed(path: str) -> Iterator[tuple[Any, Any]]:
    """The container of a video file and its video stream; what goes wrong with them is an error of ours."""
    name, extension = printable(path), os.path.splitext(path)[1].lower()
    if extension not in FORMATS:
        raise DataError(f"{name} is neither a folder of frames nor a file with {' '.join(EXTENSIONS)}")
    av = pyav(name)
    form = FORMATS[extension]
    options = {"max_pixels": str(limits.FRAME_PIXELS)}
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            if not head:
                raise BadImage(f"{name} is empty, not a video; restore or remove it")
            if _is_cut_off(file, form, head):
                raise BadImage(f"{name} is cut off after {file.tell()} bytes; restore or remove it")
            file.seek(0)
            problem = f"starts with {head[:8]!r} and is no whole {extension} video"
            # FFmpeg gets an open file, and may open none itself.
            with av.open(
                file,
                format=form,
                options=options,  # FFmpeg decodes a frame already to learn of the format
                container_options={"protocol_whitelist": "none"},
                metadata_errors="replace",
            ) as container:
                stream = _video_stream(container, name)
                container.flags &= ~GENERATE_TIMES
                stream.codec_context.options = options
                stream.codec_context.thread_count = 1  # loaders have processes side by side
                problem = "is damaged"
                yield container, stream
    except av.FFmpegError as error:
        raise BadImage(f"{name} {problem} ({error.strerror}); restore, convert or remove it") from error
    except OSError as error:
        raise files.cannot_read(name, error) from error


def _is_cut_off(file: BinaryIO, form: str, head: bytes) -> bool:
    """Whether the end is missing, where FFmpeg would not tell; leaves the file at its end."""
    size = file.seek(0, os.SEEK_END)
    if form == "gif":
        file.seek(-min(size, 1024), os.SEEK_END)
        return head.startswith(b"GIF8") and not file.read().rstrip(b"\0").endswith(b";")
    at = head.find(MATROSKA_SEGMENT) + 4
    if form != "matroska" or not 4 <= at < len(head) - 8:
        return False
    length = 9 - head[at].bit_length()  # of the segment's size: the zeros before the first one say it
    limit = 1 << 7 * length
    promised = int.from_bytes(head[at : at + length]) % limit
    return promised != limit - 1 and at + length + promised > size  # all ones: a live recording's, unknown


def _video_stream(container: Any, name: str) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise BadImage(
            f"{name} has {len(container.streams)} streams, but none of video; restore or remove it"
        )
    if stream.codec_context is None:
        raise BadImage(f"{name} has video of a kind that FFmpeg cannot decode here; convert or remove it")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= limits.FRAME_PIXELS:  # FFmpeg says 0 of what it refuses to look into
        found = f"{width} x {height} = {width * height}, more" if width else "no pixels, or more"
        raise BadImage(
            f"{name} has frames of {found} than the {limits.FRAME_PIXELS} allowed; shrink or remove it"
        )
    return stream


def _is_shown(packet: Any) -> bool:
    """Whether a frame comes of it: not of the end's mark, what an edit list cuts or a hidden frame of VP8."""
    if packet.size == 0 or packet.is_discard:
        return False
    return packet.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _to_image(frame: Any, background: Colour | None) -> Image.Image:
    if background is None or frame.format.name not in WITH_ALPHA:
        image = frame.to_image(threads=1)
    else:
        image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba", threads=1)), background)
    turn = UPRIGHT.get(frame.rotation % 360)  # phones film sideways, and write the angle
    return image if turn is None else image.transpose(turn)
