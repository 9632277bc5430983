"""One rule for whatever lists a folder of images or clips: what is taken, what is ignored, which links count.

* Files and folders whose names begin with a dot are ignored.
* A file is taken by its ending, or, where nobody knows the ending, by its content: its first bytes.
* Links are followed. One that leads nowhere, or back, is an error. One that leads out of the folder is an
  error without ``follow_links``, but for a snapshot in the cache of the Hugging Face hub, whose files all lie
  in the folder ``blobs`` beside it.
* What is ignored is kept by name, so that it can be said.

A folder is read by ``os.scandir``, which tells files from folders without a look at each; no torch
is imported.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError, listed, printable
from iwin_dit.runtime.progress import progress

T = TypeVar("T")
IS_POINTER = (
    "is a pointer of Git LFS, which stands for the file; fetch the files themselves with `git lfs pull`"
)
ALLOW_LINKS = "copy it there, or allow such links with --follow-links (in a recipe, data.follow_links true)"


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


class Listing(NamedTuple):
    """Paths below a folder, relative to it: the files that are taken, and what is ignored."""

    files: list[str]
    ignored: list[str]


def list_files(path: str | Path, wanted: Wanted = IMAGES, follow_links: bool = False) -> Listing:
    """All files below a folder that a reader takes, by folder, then by name; by default the images.

    Raises:
        DataError: where it is no folder or cannot be read, or a link leads out, nowhere or back.
    """
    with Folder(path, wanted, follow_links) as folder:
        return Listing(folder.files_below(), folder.ignored)


def ignored_line(where: str, what: str, ignored: Sequence[str]) -> str | None:
    """A line that says which files of a folder, or members of an archive, are ignored; None where none are.

    Args:
        what: is wanted, such as ``images``.
    """
    if not ignored:
        return None
    return f"ignored {len(ignored):,} in {where} that are no {what}: {listed(ignored, 5)}"


class Folder:
    """A folder that is listed, as a context that shows progress where it takes more than some seconds.

    Args:
        path: the folder, which may be a link itself.
        wanted: which files are taken.
        follow_links: links may lead out of the folder.

    Raises:
        DataError: where it is no folder.
    """

    def __init__(self, path: str | Path, wanted: Wanted = IMAGES, follow_links: bool = False):
        if not os.path.isdir(path):
            raise DataError(f"{path} is not a folder; give the folder of the images")
        self.root = os.path.realpath(path)
        self.ignored: list[str] = []
        self._checked: set[str] = set()
        self._wanted = wanted
        self._inside = None if follow_links else (self.root, *_blobs_of_hub_cache(self.root))
        is_main = os.environ.get("RANK", "0") == "0"  # of several processes, which all list, one shows it
        self._bar = progress(unit="file", desc=f"list {path}", delay=3, disable=not is_main, leave=False)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def folders(self) -> list[str]:
        """Names of the folders that it directly holds, sorted. The files beside them are ignored."""
        folders, names = self._entries("")
        self.ignored += names
        return sorted(folders)

    def files_below(self, folder: str = "") -> list[str]:
        """Paths of files at any depth, relative to the root, by folder, then by name.

        This is the order of torchvision's ``ImageFolder``.

        Raises:
            DataError: where a folder cannot be read, or a link leads out, nowhere, back, or to a folder that
                was listed already.
        """
        found: list[tuple[str, list[str]]] = []
        waiting, seen = [folder], {self.root} if folder else set()
        while waiting:
            folder = waiting.pop()
            path = os.path.join(self.root, folder)
            real = os.path.realpath(path)
            if real in seen:
                raise DataError(
                    f"{printable(path)} leads back to {printable(real)} by a link: a loop, or images twice; "
                    "remove the link"
                )
            seen.add(real)
            folders, names = self._entries(folder)
            found.append((folder, sorted(names)))
            waiting += [os.path.join(folder, name) for name in folders]
        return [f"{folder}/{name}" if folder else name for folder, names in sorted(found) for name in names]

    def files(self) -> list[str]:
        """Sorted names of the files that the folder directly holds."""
        return sorted(self._entries("")[1])

    def check_link(self, path: str) -> None:
        """Raises DataError where a link leads nowhere, or out of the folder and may not."""
        try:
            real = os.path.realpath(path, strict=True)
        except OSError as error:
            raise DataError(
                f"{printable(path)} is a link that loops or leads nowhere ({error.strerror}); remove it"
            ) from None
        if self._inside is not None and not any(Path(real).is_relative_to(root) for root in self._inside):
            raise DataError(
                f"{printable(path)} is a link to {printable(real)}, out of {self.root}; {ALLOW_LINKS}"
            )

    def check_file(self, file: str) -> None:
        """Raises DataError where a path relative to the root is none of a file below it that may be read."""
        folder, path = os.path.dirname(file), os.path.join(self.root, file)
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise DataError(f"{printable(file)} leads out of {self.root}; give a file in that folder")
        try:
            if folder not in self._checked:  # for all files of a folder once
                self.check_link(os.path.join(self.root, folder))
                self._checked.add(folder)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                mode = os.stat(path).st_mode
                self.check_link(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{printable(file)} is not in {self.root} ({reason}); add it") from None
        if not stat.S_ISREG(mode):
            raise DataError(f"{printable(file)} in {self.root} is not a file; give a file")

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of folders and of files that are taken; the others are noted."""
        path = os.path.join(self.root, folder)
        folders: list[str] = []
        names: list[str] = []
        with reading(path, os.scandir) as entries:
            for entry in entries:
                kind = self._kind(entry)
                if kind is None:
                    self.ignored.append(os.path.join(folder, entry.name))
                else:
                    (folders if kind == "folder" else names).append(entry.name)
        self._bar.update(len(names))
        return folders, names

    def _kind(self, entry: os.DirEntry[str]) -> str | None:
        """``folder`` or ``file``; None for what is ignored. Only links and unknown endings cost a look."""
        if entry.name.startswith("."):
            return None
        is_link = entry.is_symlink()
        is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
        taken = None if is_folder else self._wanted.by_ending(entry.name)
        if taken is False:
            return None
        if is_link:
            self.check_link(entry.path)
        if is_folder:
            return "folder"
        if not entry.is_file():  # a pipe would wait for ever
            return None
        return "file" if taken or self._wanted.by_content(read_file(entry.path, HEAD_BYTES)) else None


def reading(path: str, read: Callable[[str], T]) -> T:
    """What ``read(path)`` returns; it is called again after errors of the storage that may pass.

    Raises:
        DataError: where it cannot be read.
        StorageError: where the storage does not deliver it.
    """
    try:
        return files.retry(lambda: read(path))
    except OSError as error:
        raise files.cannot_read(printable(path), error) from error


def read_file(path: str, most: int = -1, start: int = 0) -> bytes:
    """So many bytes from a place in a file, by default all; errors as of :func:`reading`."""

    def read(path: str) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(most)

    return reading(path, read)


def stamped(root: str, file: str) -> tuple[str, int]:
    """Size and path below ``root``, as in a copy elsewhere, and when it was modified, in nanoseconds."""
    found = reading(os.path.join(root, file), os.stat)
    return f"{found.st_size} {file}", found.st_mtime_ns


def refuse_pointer(path: str) -> None:
    """Raises DataError where a file is a pointer of Git LFS, or cannot be read."""
    if files.is_lfs_pointer(read_file(path, HEAD_BYTES)):
        raise DataError(f"{printable(path)} {IS_POINTER}")


def _blobs_of_hub_cache(root: str) -> list[str]:
    """Where the files of a snapshot, ``.../snapshots/REVISION[/...]``, really lie: ``.../blobs``."""
    for folder in (Path(root), *Path(root).parents):
        blobs = folder.parent.parent / "blobs"
        if folder.parent.name == "snapshots" and blobs.is_dir():
            return [str(blobs)]
    return []
