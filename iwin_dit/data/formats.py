"""Which files are images: by their ending where it says so, otherwise by their first bytes.

Imports no torch, so that a folder is listed at once.
"""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """A format of images: the endings that files of it usually have, and how their first bytes begin."""

    endings: tuple[str, ...]
    starts: tuple[bytes, ...]


# Pillow's names of the formats that we open: those of single pictures whose readers run no other program.
FORMATS = {
    "PNG": Format((".png", ".apng"), (b"\x89PNG\r\n\x1a\n",)),
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif"), (b"\xff\xd8\xff",)),
    "WEBP": Format((".webp",), (b"RIFF",)),
    "BMP": Format((".bmp", ".dib"), (b"BM",)),
    "GIF": Format((".gif",), (b"GIF87a", b"GIF89a")),
    "TIFF": Format((".tif", ".tiff"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    "AVIF": Format((".avif",), (b"",)),
}
ENDINGS = tuple(ending for format in FORMATS.values() for ending in format.endings)
# What lies beside images and is never one. A look at each caption of a large set would take long.
BESIDE = {".txt", ".json", ".jsonl", ".cls", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html"}
BESIDE |= {".npy", ".npz", ".mat", ".pt", ".zip", ".tar"}
HEAD_BYTES = 64  # of a file, as many as image_format looks at


def image_format(head: bytes) -> str | None:
    """Pillow's name of the format of a file with these first bytes; None where it is no image that we open.

    Args:
        head: at least the first ``HEAD_BYTES`` bytes, or the whole of a shorter file.
    """
    for name, format in FORMATS.items():
        if head.startswith(format.starts) and _is(name, head):
            return name
    return None


def _is(name: str, head: bytes) -> bool:
    """Whether the bytes behind a start that other files have too are those of the format."""
    if name == "WEBP":  # RIFF also begins .wav and .avi
        return head[8:12] == b"WEBP"
    if name == "BMP":  # a text may begin with BM; the size of the second header is one of few
        return head[14:18] in {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}
    if name == "AVIF":  # a box of brands: the major one, or a compatible one of a general image file
        size = int.from_bytes(head[:4], "big")
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))}
        return head[4:8] == b"ftyp" and bool(brands & {b"avif", b"avis"})
    return True


class Wanted(NamedTuple):
    """Which files of a folder a reader takes.

    endings: a file with one of them is taken without a look at it.
    formats: a file with an ending that nobody knows, or with none, is taken where its content is of one.
    """

    endings: frozenset[str]
    formats: frozenset[str]

    def by_ending(self, name: str) -> bool | None:
        """Whether a file of this name is taken; None where only its content can tell."""
        ending = f".{name.rpartition('.')[2]}".lower()
        if ending in self.endings:
            return True
        return False if ending in BESIDE or not self.formats else None

    def by_content(self, head: bytes) -> bool:
        """Whether a file with these first bytes is taken."""
        return image_format(head) in self.formats


IMAGES = Wanted(frozenset(ENDINGS), frozenset(FORMATS))
