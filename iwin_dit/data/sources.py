"""Where images and clips come from: class folders, a CSV, tar shards or Hugging Face data.

Every source of images knows its ``class_names``, its length, ``read(i) -> (encoded bytes, label)``, a
``name(i)`` for errors and a ``stamp(i)`` that changes with image i. None holds a file open, so that all can
be sent to worker processes.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iwin_dit.data.classes import IMAGENET_NAMES, check_classes, classes_of, in_order
from iwin_dit.data.folders import ENDINGS, IMAGES, Folder, read_file, stamped
from iwin_dit.data.hugging_face import HuggingFaceSource, is_of_datasets
from iwin_dit.data.packed_sources import WebDatasetSource, are_tars
from iwin_dit.data.video import CLIPS, EXTENSIONS, FRAMES, check_numbers, frame_names
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, listed, printable
from iwin_dit.runtime.run import TIMES

# of ImageNet's 1000 synset ids, sorted, a line each: any other thousand must not get ImageNet's names
SYNSETS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
STAMPS_AT_ONCE = 1000


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
    is_named = bool(colon) and scheme in SCHEMES
    return not os.path.isdir(location) and (is_named or location.endswith(".tar") or are_tars(location))


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
    if labels is None and is_folder and is_of_datasets(location):
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
    if are_tars(location) or (os.path.isfile(location) and location.endswith(".tar")):
        return WebDatasetSource(location)
    if os.path.exists(location):
        raise DataError(f"{location} is neither a folder nor a .tar file; give the folder of the images")
    raise DataError(f"{location} does not exist; give a folder of images, .tar files or hf:NAME")


def open_images(
    location: str, options: Any, are_clips: bool = False, begun: list[str] | None = None
) -> Source | ClipFolderSource:
    """The source of images or clips, whose classes are questioned before work begins.

    Args:
        options: arguments or a section of a recipe, with ``labels``, ``follow_links``, ``allow_odd_classes``
            and what chooses among Hugging Face data.
        are_clips: it holds videos.
        begun: the classes of what goes on here, which were accepted when it began, in their order.

    Raises:
        DataError: where it is missing, or its classes are hardly what was meant.
    """
    columns = {name: getattr(options, name) for name in ("split", "image_column", "label_column")}
    source: Source | ClipFolderSource
    if not are_clips:
        source = open_source(location, options.labels, options.follow_links, begun, **columns)
    elif given := [name for name, value in columns.items() if value is not None]:
        raise DataError(f"{given[0]} is for Hugging Face data; clips lie in class folders: leave it out")
    else:
        source = ClipFolderSource(location, options.follow_links, begun)
    if not options.allow_odd_classes and source.class_names != begun:
        check_classes(source, location)
    return source


def classes_begun(path: Path, key: str) -> list[str] | None:
    """The classes that a run or an extraction wrote down when it began; None where there is no such list."""
    try:
        found = files.read_json(path, limits.INDEX_BYTES)[key]
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads the rest of it says what is wrong
        return None
    is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return found if is_list else None


def identity_of(source: Any) -> dict[str, Any]:
    """What makes the images or clips of a source the same to a run that is resumed, without reading them.

    That is their number, their classes, and hashes of their names, of names with labels and sizes, and of
    the times when they were modified. Times alone differ in a copy elsewhere too.

    Raises:
        DataError: where a file is not there any more.
    """
    names, content, times = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:  # a network file system answers several at once
        parts = (range(len(source))[k : k + STAMPS_AT_ONCE] for k in range(0, len(source), STAMPS_AT_ONCE))
        stamps = pool.map(lambda part: [source.stamp(i) for i in part], parts)
        for i, (fingerprint, modified) in enumerate(chain.from_iterable(stamps)):
            separator = "\n" if i else ""
            names.update((separator + source.name(i).rpartition("/")[2]).encode(errors="replace"))
            content.update((fingerprint + "\0").encode(errors="surrogateescape"))
            times.update(f"{modified}\0".encode())
    return {
        "images": len(source),
        "classes": source.class_names,
        "names_sha256": names.hexdigest(),
        "files_sha256": content.hexdigest(),
        TIMES: times.hexdigest(),
    }


class Files:
    """What lies below ``root``: images, or clips, with the class of each, and what a source says of it."""

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

    def stamp(self, i: int) -> tuple[str, int]:
        stamps = [stamped(self.root, file) for file in self._files(i)]
        return f"{self.labels[i]} {' '.join(found for found, _ in stamps)}", max(time for _, time in stamps)

    def _files(self, i: int) -> list[str]:
        return [self._paths[i]]

    def _list_classes(
        self,
        folder: Folder,
        below: Callable[[str], list[str]],
        what: str,
        expected: str,
        order: Sequence[str] | None,
    ) -> None:
        """Takes class folders in order, and what ``below(folder)`` finds in each.

        Raises:
            DataError: where nothing is found, or in a class nothing, or a class's name is not UTF-8.
        """
        self.root = folder.root
        folders = in_order(folder.folders(), self.root, order)
        if odd := [name for name in folders if printable(name) != name]:
            raise DataError(
                f"the class folder {listed(odd)} of {self.root} has a name that is not UTF-8; rename it, "
                "since the model's classes are named by it"
            )
        found = [below(name) for name in folders]
        if not any(found):
            raise DataError(
                f"there are no {what} in {listed(folders) or 'any class folder'} of {self.root}; expected "
                f"{self.root}/CLASS/{expected}"
            )
        if empty := [name for name, paths in zip(folders, found, strict=True) if not paths]:
            raise DataError(
                f"{len(empty)} of {len(folders)} class folders of {self.root} have no {what}: "
                f"{listed(empty)}; fill or remove them"
            )
        self.class_names, self.ignored = folders, folder.ignored
        self.labels = [label for label, paths in enumerate(found) for _ in paths]
        self._paths = [path for paths in found for path in paths]


class _ImageFiles(Files):
    def read(self, i: int) -> tuple[bytes, int]:
        return read_file(self.path(i)), self.labels[i]


class FolderSource(_ImageFiles):
    """A folder per class, with images at any depth, by the rule of :mod:`iwin_dit.data.folders`.

    They are in the order of torchvision's ``ImageFolder``, but class folders whose names are all numbers are
    classes in the order of the numbers. The 1000 synset ids of ImageNet become its class names.

    Raises:
        DataError: where there are no images, a class has none, or a link may not be followed.
    """

    def __init__(self, root: str | Path, follow_links: bool = False, order: Sequence[str] | None = None):
        with Folder(root, IMAGES, follow_links) as folder:
            expected = f"IMAGE with {' '.join(ENDINGS)}"
            self._list_classes(folder, folder.files_below, "images", expected, order)
        ids = hashlib.sha256("\n".join(self.class_names).encode(errors="replace")).hexdigest()
        if ids == SYNSETS_SHA256:
            self.class_names = list(IMAGENET_NAMES)


class CsvSource(_ImageFiles):
    """Images in a folder, with labels in a CSV of the header ``file,label``.

    Labels that are all integers stay so, and the classes are ``0`` to the largest; otherwise they are class
    names, numbered in sorted order.

    Raises:
        DataError: with the line, where a file is missing or outside ``root``, or the CSV is not as expected.
    """

    def __init__(self, root: str | Path, csv_file: str | Path, follow_links: bool = False):
        folder = Folder(root, IMAGES, follow_links)
        self.root, self.ignored, self._paths = folder.root, [], []
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


class ClipFolderSource(Files):
    """A folder per class, with video files and folders of frames below it at any depth, in sorted order.

    A folder that directly holds images is one clip, its frames in the order of their names. What is taken
    and which links count is the rule of :mod:`iwin_dit.data.folders`.

    Raises:
        DataError: where there are no clips; a class has none; a link may not be followed; images lie in a
            class folder or beside videos; or names put frame 10 before frame 2.
    """

    def __init__(self, root: str | Path, follow_links: bool = False, order: Sequence[str] | None = None):
        images = " ".join(sorted(FRAMES.endings))
        expected = f"CLIP with {' '.join(EXTENSIONS)}, or frames CLASS/CLIP/FRAME with {images}"
        with Folder(root, CLIPS, follow_links) as folder:
            self._list_classes(folder, partial(_clips_below, folder), "clips", expected, order)

    def _files(self, i: int) -> list[str]:
        clip, path = self._paths[i], self.path(i)
        return [os.path.join(clip, name) for name in frame_names(path)] if os.path.isdir(path) else [clip]


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
