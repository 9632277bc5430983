"""Where encoded images come from: class folders, a CSV, tar shards or Hugging Face data.

Every source knows its ``class_names``, its length, ``read(i) -> (encoded bytes, label)``, a ``name(i)`` for
errors and a ``stamp(i)`` that changes with image i. None holds a file open, so that all can be sent to worker
processes.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iwin_dit.data.classes import IMAGENET_NAMES, classes_of, in_order
from iwin_dit.data.folders import Folder
from iwin_dit.data.formats import ENDINGS, IMAGES
from iwin_dit.data.hugging_face import HuggingFaceSource, has_parquet, is_saved
from iwin_dit.data.packed_sources import RANGE, WebDatasetSource, read_file, stamped
from iwin_dit.runtime.errors import DataError, listed, printable
from iwin_dit.runtime.run import TIMES

# of ImageNet's 1000 synset ids, sorted, a line each: any other thousand must not get ImageNet's names
SYNSETS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class Source(Protocol):
    """Encoded images and their labels.

    ignored: files or members that are not taken, since they are no images or are hidden.
    """

    class_names: list[str]
    ignored: list[str]

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """The class of each image."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, int]:
        """Encoded bytes and label of image i."""

    def name(self, i: int) -> str:
        """What to call image i in an error."""

    def stamp(self, i: int) -> tuple[str, int]:
        """What tells image i from another without reading it, and when its file was modified.

        That is label, size and name below the root, and a time in nanoseconds.
        """


# What opens a location such as ``hf:NAME``, by what stands before the colon: it is called with what stands
# behind, ``follow_links`` and the columns of :func:`open_source`.
SCHEMES: dict[str, Callable[..., Source]] = {
    "hf": HuggingFaceSource,
}


def is_packed(location: str) -> bool:
    """Whether a location is no folder, but ``hf:NAME``, or a .tar file, glob or range."""
    scheme, colon, _ = location.partition(":")
    is_tars = location.endswith(".tar") or glob.has_magic(location) or RANGE.search(location)
    return not os.path.isdir(location) and bool((colon and scheme in SCHEMES) or is_tars)


def open_source(
    location: str,
    labels: str | None = None,
    follow_links: bool = False,
    order: Sequence[str] | None = None,
    **columns: str | None,
) -> Source:
    """The source that fits a location.

    Args:
        location: a folder of class folders, of .tar or of .parquet files, or of ``save_to_disk``; a .tar
            file, glob or range; or ``hf:NAME``; with ``labels`` a folder of images.
        labels: a CSV file with the columns file and label.
        follow_links: links may lead out of the folder.
        order: of class folders, which a run was begun with.
        columns: ``split``, ``image_column`` and ``label_column`` of Hugging Face data.

    Raises:
        DataError: where nothing is there, or not what was expected.
    """
    is_folder = os.path.isdir(location)
    scheme, colon, name = location.partition(":")
    if labels is None and is_folder and (is_saved(location) or has_parquet(location)):
        scheme, colon, name = "hf", ":", location
    if colon and scheme in SCHEMES:
        if labels is not None:
            raise DataError(f"{location} has labels of its own; leave out the labels in {labels}")
        return SCHEMES[scheme](name, follow_links=follow_links, **columns)
    if given := [key for key, value in columns.items() if value is not None]:
        raise DataError(f"{given[0]} is for Hugging Face data, which {location} is not; leave it out")
    if labels is not None:
        return CsvSource(location, labels, follow_links)
    if is_folder:
        if glob.glob(os.path.join(glob.escape(location), "*.tar")):
            return WebDatasetSource(location, follow_links)
        return FolderSource(location, follow_links, order)
    if (
        (os.path.isfile(location) and location.endswith(".tar"))
        or glob.has_magic(location)
        or RANGE.search(location)
    ):
        return WebDatasetSource(location)
    if os.path.exists(location):
        raise DataError(f"{location} is neither a folder nor a .tar file; give the folder of the images")
    raise DataError(f"{location} does not exist; give a folder of images, .tar files or hf:NAME")


STAMPS_AT_ONCE = 1000


def identity_of(source: Any, chosen: Sequence[int] | None = None) -> dict[str, Any]:
    """What makes the images of a source the same to a run that is resumed, without reading them.

    That is their number, their classes, and hashes of their names, of names with labels and sizes, and of
    the times when they were modified. Times alone differ in a copy elsewhere too.

    Args:
        source: of images or clips.
        chosen: the numbers of some images. Default: all.

    Raises:
        DataError: where a file is not there any more.
    """
    chosen = range(len(source)) if chosen is None else chosen
    names, content, times = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    parts = [chosen[start : start + STAMPS_AT_ONCE] for start in range(0, len(chosen), STAMPS_AT_ONCE)]
    with ThreadPoolExecutor(8) as pool:  # a network file system answers several at once
        for part, stamps in zip(
            parts, pool.map(lambda part: [source.stamp(i) for i in part], parts), strict=True
        ):
            for i, (fingerprint, modified) in zip(part, stamps, strict=True):
                separator = "\n" if i != chosen[0] else ""
                names.update((separator + source.name(i).rpartition("/")[2]).encode(errors="replace"))
                content.update((fingerprint + "\0").encode(errors="surrogateescape"))
                times.update(f"{modified}\0".encode())
    return {
        "images": len(chosen),
        "classes": source.class_names,
        "names_sha256": names.hexdigest(),
        "files_sha256": content.hexdigest(),
        TIMES: times.hexdigest(),
    }


class Files:
    """What lies below ``root``: images, or clips, with the class of each and names for errors."""

    root: str
    class_names: list[str]
    labels: list[int]
    ignored: list[str]
    _paths: list[str]  # below the root

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self._paths[i])

    def name(self, i: int) -> str:
        return printable(self.path(i))


class _ImageFiles(Files):
    """What a folder of classes and a CSV have in common."""

    def read(self, i: int) -> tuple[bytes, int]:
        return read_file(self.path(i)), self.labels[i]

    def stamp(self, i: int) -> tuple[str, int]:
        found, modified = stamped(self.root, self._paths[i])
        return f"{self.labels[i]} {found}", modified


class FolderSource(_ImageFiles):
    """A folder per class, with images at any depth, by the rule of :mod:`iwin_dit.data.folders`.

    They are in the order of torchvision's ``ImageFolder``, but class folders whose names are all numbers are
    classes in the order of the numbers. The 1000 synset ids of ImageNet become its class names.

    Raises:
        DataError: where there are no images, a class has none, or a link may not be followed.
    """

    def __init__(self, root: str | Path, follow_links: bool = False, order: Sequence[str] | None = None):
        expected = f"IMAGE with {' '.join(ENDINGS)}"
        with Folder(root, IMAGES, follow_links) as folder:
            folders, self._paths, self.labels = by_class(
                folder, folder.files_below, "images", expected, order
            )
        self.root, self.ignored = folder.root, folder.ignored
        ids = hashlib.sha256("\n".join(folders).encode(errors="replace")).hexdigest()
        self.class_names = list(IMAGENET_NAMES) if ids == SYNSETS_SHA256 else folders


class CsvSource(_ImageFiles):
    """Images in a folder, with labels in a CSV of the header ``file,label``.

    Labels that are all integers stay so, and the classes are ``0`` to the largest; otherwise they are class
    names, numbered in sorted order.

    Raises:
        DataError: with the line, where a file is missing or outside ``root``, or the CSV is not as expected.
    """

    def __init__(self, root: str | Path, csv_file: str | Path, follow_links: bool = False):
        folder = Folder(root, IMAGES, follow_links)
        self.root, self.ignored = folder.root, []
        self._paths = []
        labels: list[str] = []
        places: list[str] = []
        line_of: dict[str, int] = {}  # of the row that names a file first
        try:
            with open(csv_file, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                if not {"file", "label"} <= set(rows.fieldnames or ()):
                    raise DataError(
                        f"{csv_file} begins with {rows.fieldnames}; expected the header file,label"
                    )
                for row in rows:
                    where = f"{csv_file}, line {rows.line_num}"
                    if not row["file"] or row["label"] is None or None in row:
                        raise DataError(f"{where}: found {list(row.values())}, expected a file and a label")
                    try:
                        folder.check_file(row["file"])
                    except DataError as error:
                        raise DataError(f"{where}: {error}, or drop the line") from None
                    first = line_of.setdefault(os.path.normpath(row["file"]), len(labels))
                    if first < len(labels) and labels[first] != row["label"]:
                        raise DataError(
                            f"{where}: {row['file']} has the label {row['label']!r}, in {places[first]} "
                            f"it has {labels[first]!r}; keep one of them"
                        )
                    self._paths.append(row["file"])
                    labels.append(row["label"])
                    places.append(f"line {rows.line_num}")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{csv_file} cannot be read as CSV in UTF-8: {error}") from error
        if not labels:
            raise DataError(f"{csv_file} lists no images; expected a line FILE,LABEL for each")
        try:
            self.class_names, self.labels = classes_of(labels, places)
        except DataError as error:
            raise DataError(f"{csv_file}, {error}") from None


def by_class(
    root: Folder,
    below: Callable[[str], list[str]],
    what: str,
    expected: str,
    order: Sequence[str] | None = None,
) -> tuple[list[str], list[str], list[int]]:
    """Class folders in order, then what ``below(folder)`` finds in each, with their labels.

    Raises:
        DataError: where nothing is found, or in a class nothing, or a class's name is not UTF-8.
    """
    folders = in_order(root.folders(), root.root, order)
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
