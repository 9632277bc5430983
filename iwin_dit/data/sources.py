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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torchvision.models._meta import _IMAGENET_CATEGORIES as IMAGENET_NAMES

from iwin_dit.data.folders import Folder, listed, printable
from iwin_dit.data.formats import ENDINGS, IMAGES
from iwin_dit.data.packed_sources import HuggingFaceSource, WebDatasetSource, label_of, read_file, sized
from iwin_dit.runtime.errors import DataError

# of ImageNet's 1000 synset ids, sorted, a line each: any other thousand must not get ImageNet's names
SYNSETS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class Source(Protocol):
    """Encoded images and their labels.

    ignored: files or members that are not taken, since they are no images or are hidden.
    """

    class_names: list[str]
    ignored: list[str]

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, int]:
        """Encoded bytes and label of image i."""

    def name(self, i: int) -> str:
        """What to call image i in an error."""

    def fingerprint(self, i: int) -> str:
        """Size, label and name below the root: what tells image i from another without reading it."""


def open_source(location: str, labels: str | None = None, follow_links: bool = False) -> Source:
    """The source that fits a location.

    Args:
        location: a folder of class folders, of .tar or of .parquet files, a .tar file or glob, or
            ``hf:NAME``; with ``labels`` a folder of images.
        labels: a CSV file with the columns file and label.
        follow_links: links may lead out of the folder.

    Raises:
        DataError: where nothing is there, or not what was expected.
    """
    if location.startswith("hf:"):
        if labels is not None:
            raise DataError(f"{location} has labels of its own; leave out the labels in {labels}")
        return HuggingFaceSource(location.removeprefix("hf:"))
    if labels is not None:
        return CsvSource(location, labels, follow_links)
    if os.path.isdir(location):
        folder = Path(glob.escape(location))
        if glob.glob(str(folder / "*.tar")):
            return WebDatasetSource(location)
        if glob.glob(str(folder / "*.parquet")) or glob.glob(str(folder / "data" / "*.parquet")):
            return HuggingFaceSource(location)
        return FolderSource(location, follow_links)
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
    ignored: list[str]
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
    """A folder per class, with images at any depth, by the rule of :mod:`iwin_dit.data.folders`.

    They are in the order of torchvision's ``ImageFolder``. The 1000 synset ids of ImageNet become its class
    names.

    Raises:
        DataError: where there are no images, a class has none, or a link may not be followed.
    """

    def __init__(self, root: str | Path, follow_links: bool = False):
        expected = f"IMAGE with {' '.join(ENDINGS)}"
        with Folder(root, IMAGES, follow_links) as folder:
            folders, self._files, self._labels = by_class(folder, folder.files_below, "images", expected)
        self.root, self.ignored = folder.root, folder.ignored
        ids = hashlib.sha256("\n".join(folders).encode(errors="replace")).hexdigest()
        self.class_names = list(IMAGENET_NAMES) if ids == SYNSETS_SHA256 else folders


class CsvSource(_FilesSource):
    """Images in a folder, with labels in a CSV of the header ``file,label``.

    Labels that are all integers stay so, and the classes are ``0`` to the largest; otherwise they are class
    names, numbered in sorted order.

    Raises:
        DataError: with the line, where a file is missing or outside ``root``, or the CSV is not as expected.
    """

    def __init__(self, root: str | Path, csv_file: str | Path, follow_links: bool = False):
        folder = Folder(root, IMAGES, follow_links)
        self.root, self.ignored = folder.root, []
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
                    try:
                        folder.check_file(row["file"])
                    except DataError as error:
                        raise DataError(f"{where}: {error}, or drop the line") from None
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


def by_class(
    root: Folder, below: Callable[[str], list[str]], what: str, expected: str
) -> tuple[list[str], list[str], list[int]]:
    """Class folders, sorted, then what ``below(folder)`` finds in each, with their labels.

    Raises:
        DataError: where nothing is found, or in a class nothing, or a class's name is not UTF-8.
    """
    folders = root.folders()
    if odd := [folder for folder in folders if printable(folder) != folder]:
        raise DataError(
            f"the class folder {listed(odd)} of {root.root} has a name that is not UTF-8; rename it, since "
            "the model's classes are named by it"
        )
    found = [below(folder) for folder in folders]
    if not any(found):
        raise DataError(
            f"there are no {what} in {listed(folders) or 'any class folder'} of {root.root}; expected "
            f"{root.root}/CLASS/{expected}"
        )
    empty = [folder for folder, files in zip(folders, found, strict=True) if not files]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(folders)} class folders of {root.root} have no {what}: {listed(empty)}; "
            "fill or remove them"
        )
    labels = [label for label, files in enumerate(found) for _ in files]
    return folders, [file for files in found for file in files], labels
