"""Where encoded images come from: class folders, a CSV, tar shards or Hugging Face data.

Every source knows its ``class_names``, its length, ``read(i) -> (encoded bytes, label)``, a ``name(i)`` for
errors and a ``fingerprint(i)`` that changes with image i. None holds a file open, so that all can be sent to
worker processes.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torchvision.models._meta import _IMAGENET_CATEGORIES

from iwin_dit.data.packed_sources import (
    EXTENSIONS,
    HuggingFaceSource,
    WebDatasetSource,
    label_of,
    listed,
    printable,
    read_file,
    sized,
)
from iwin_dit.runtime.errors import DataError

# of ImageNet's 1000 synset ids, sorted, a line each: any other thousand must not get ImageNet's names
SYNSETS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class Source(Protocol):
    """Encoded images and their labels."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, int]:
        """Encoded bytes and label of image i."""

    def name(self, i: int) -> str:
        """What to call image i in an error."""

    def fingerprint(self, i: int) -> str:
        """Size, label and name below the root: what tells image i from another without reading it."""


def open_source(location: str, labels: str | None = None) -> Source:
    """The source that fits a location.

    Args:
        location: a folder of class folders, of .tar or of .parquet files, a .tar file or glob, or
            ``hf:NAME``; with ``labels`` a folder of images.
        labels: a CSV file with the columns file and label.

    Raises:
        DataError: where nothing is there, or not what was expected.
    """
    if location.startswith("hf:"):
        if labels is not None:
            raise DataError(f"{location} has labels of its own; leave out the labels in {labels}")
        return HuggingFaceSource(location.removeprefix("hf:"))
    if labels is not None:
        return CsvSource(location, labels)
    if os.path.isdir(location):
        folder = Path(glob.escape(location))
        if glob.glob(str(folder / "*.tar")):
            return WebDatasetSource(location)
        if glob.glob(str(folder / "*.parquet")) or glob.glob(str(folder / "data" / "*.parquet")):
            return HuggingFaceSource(location)
        return FolderSource(location)
    if (os.path.isfile(location) and location.endswith(".tar")) or glob.has_magic(location):
        return WebDatasetSource(location)
    if os.path.exists(location):
        raise DataError(f"{location} is neither a folder nor a .tar file; give the folder of the images")
    raise DataError(f"{location} does not exist; give a folder of images, .tar files or hf:NAME")


def identity_of(source: Any) -> dict[str, Any]:
    """Number, classes and names of what a source has: what makes it the same to a run that is resumed."""
    names = "\n".join(source.name(i).rpartition("/")[2] for i in range(len(source)))
    return {
        "images": len(source),
        "classes": source.class_names,
        "names_sha256": hashlib.sha256(names.encode(errors="replace")).hexdigest(),
    }


class _FilesSource:
    """Image files below ``root``: what a folder of classes and a CSV have in common."""

    root: str
    _files: list[str]
    _labels: list[int]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, i: int) -> tuple[bytes, int]:
        return read_file(os.path.join(self.root, self._files[i])), self._labels[i]

    def name(self, i: int) -> str:
        return printable(os.path.join(self.root, self._files[i]))

    def fingerprint(self, i: int) -> str:
        return f"{self._labels[i]} {sized(self.root, self._files[i])}"


class FolderSource(_FilesSource):
    """A folder per class, with images at any depth, in the order of torchvision's ``ImageFolder``.

    Hidden files and folders are ignored. Links are followed inside ``root`` only. The 1000 synset ids of
    ImageNet become its class names.

    Raises:
        DataError: where there are no images, a class has none, or a link loops, is dead or leads out.
    """

    def __init__(self, root: str | Path):
        self.root = real_folder(root)
        expected = f"IMAGE with {' '.join(EXTENSIONS)}"
        folders, self._files, self._labels = by_class(self.root, files_below, "images", expected)
        ids = hashlib.sha256("\n".join(folders).encode(errors="replace")).hexdigest()
        self.class_names = list(_IMAGENET_CATEGORIES) if ids == SYNSETS_SHA256 else folders


class CsvSource(_FilesSource):
    """Images in a folder, with labels in a CSV of the header ``file,label``.

    Labels that are all integers stay so, and the classes are ``0`` to the largest; otherwise they are class
    names, numbered in sorted order.

    Raises:
        DataError: with the line, where a file is missing or outside ``root``, or the CSV is not as expected.
    """

    def __init__(self, root: str | Path, csv_file: str | Path):
        self.root = real_folder(root)
        self._files = []
        labels: list[str] = []
        lines: list[int] = []
        try:
            with open(csv_file, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                if not {"file", "label"} <= set(rows.fieldnames or ()):
                    raise DataError(
                        f"{csv_file} begins with {rows.fieldnames}; expected the header file,label"
                    )
                for row in rows:
                    where = f"{csv_file}, line {rows.line_num}"
                    if not row["file"] or not row["label"] or None in row:
                        raise DataError(f"{where}: found {list(row.values())}, expected a file and a label")
                    self._check(row["file"], where)
                    self._files.append(row["file"])
                    labels.append(row["label"])
                    lines.append(rows.line_num)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{csv_file} cannot be read as CSV in UTF-8: {error}") from error
        if not labels:
            raise DataError(f"{csv_file} lists no images; expected a line FILE,LABEL for each")
        if all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
            numbers = zip(labels, lines, strict=True)
            self._labels = [label_of(label, f"{csv_file}, line {line}") for label, line in numbers]
            self.class_names = [str(i) for i in range(max(self._labels) + 1)]
        else:
            self.class_names = sorted(set(labels))
            numbers_of = {name: i for i, name in enumerate(self.class_names)}
            self._labels = [numbers_of[label] for label in labels]

    def _check(self, file: str, where: str) -> None:
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise DataError(f"{where}: {file} leads out of {self.root}; expected a file in that folder")
        try:
            real = os.path.realpath(os.path.join(self.root, file), strict=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{where}: {file} is not in {self.root} ({error}); add it or drop the line"
            ) from None
        if not _is_inside(self.root, real):
            raise DataError(f"{where}: {file} is a link to {real}, out of {self.root}; copy the file there")
        if not os.path.isfile(real):
            raise DataError(f"{where}: {file} in {self.root} is not a file")


def by_class(
    root: str, below: Callable[[str, str], list[str]], what: str, expected: str
) -> tuple[list[str], list[str], list[int]]:
    """Class folders, sorted, then what ``below(root, folder)`` finds in each, with their labels.

    Raises:
        DataError: where nothing is found, or in a class nothing, or a class's name is not UTF-8.
    """
    folders = sorted(name for name, is_folder in _entries(root, root) if is_folder)
    if odd := [folder for folder in folders if printable(folder) != folder]:
        raise DataError(
            f"the class folder {listed(odd)} of {root} has a name that is not UTF-8; rename it, since the "
            "model's classes are named by it"
        )
    found = [below(root, folder) for folder in folders]
    if not any(found):
        raise DataError(
            f"there are no {what} in {listed(folders) or 'any class folder'} of {root}; expected "
            f"{root}/CLASS/{expected}"
        )
    empty = [folder for folder, files in zip(folders, found, strict=True) if not files]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(folders)} class folders of {root} have no {what}: {listed(empty)}; fill "
            "or remove them"
        )
    labels = [label for label, files in enumerate(found) for _ in files]
    return folders, [file for files in found for file in files], labels


def real_folder(root: str | Path) -> str:
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder; give the folder of the images")
    return os.path.realpath(root)


def _is_inside(root: str, real: str) -> bool:
    return os.path.commonpath([root, real]) == root


def _entries(root: str, folder: str, extensions: tuple[str, ...] = EXTENSIONS) -> Iterator[tuple[str, bool]]:
    """Names in a folder, with whether each is a folder; neither hidden ones nor of other extensions."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():  # only links cost a look at the disk
                    real = _follow(entry.path)
                    is_folder, is_file = os.path.isdir(real), os.path.isfile(real)
                else:
                    real = None
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                if is_folder or (is_file and entry.name.lower().endswith(extensions)):
                    if real is not None and not _is_inside(root, real):
                        raise DataError(
                            f"{printable(entry.path)} is a link to {real}, out of {root}; copy the images "
                            "there, or give the folder that holds them"
                        )
                    yield entry.name, is_folder
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error


def _follow(link: str) -> str:
    try:
        return os.path.realpath(link, strict=True)
    except OSError as error:
        raise DataError(
            f"{printable(link)} is a link that loops or leads nowhere ({error.strerror}); remove it"
        ) from None


def files_below(root: str, class_folder: str, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Paths of images, relative to root, in the order of ``ImageFolder``: by folder, then by name."""
    found: list[tuple[str, list[str]]] = []
    waiting, seen = [class_folder], {root}
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(
                f"{printable(path)} leads back to {printable(real)} by a link: a loop, or images twice; "
                "remove the link"
            )
        seen.add(real)
        entries = list(_entries(root, path, extensions))
        found.append((folder, sorted(name for name, is_folder in entries if not is_folder)))
        waiting += [os.path.join(folder, name) for name, is_folder in entries if is_folder]
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in names]
