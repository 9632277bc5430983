"""Images in tar shards, which are read in place; see :mod:`iwin_dit.data.sources`."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np

from iwin_dit.data.classes import label_of, names_of
from iwin_dit.data.folders import HEAD_BYTES, IMAGES, Folder, Wanted, read_file, refuse_pointer, stamped
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, listed, printable

RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")  # of a shell and of WebDataset: shard-{000..123}.tar
TARS = Wanted(frozenset({".tar"}), frozenset())
MAX_SHARDS = 1_000_000


class WebDatasetSource:
    """Tar shards as of WebDataset: ``KEY.jpg`` (or another image) with ``KEY.cls``, an integer, or
    ``KEY.json`` with an integer ``label``.

    Class names are the lines of ``classes.txt`` or the list in ``class_names.json`` beside the first shard,
    otherwise the numbers. Nothing is extracted: the offsets are indexed once.

    Args:
        pattern_or_folder: a .tar file, a folder of them, a glob, or names with a range such as
            ``shard-{000..123}.tar``; they are read in sorted order.
        follow_links: links to shards may lead out of the folder.

    Raises:
        DataError: where there are no samples, a shard is damaged or a label is missing or makes no sense.
    """

    def __init__(self, pattern_or_folder: str | Path, follow_links: bool = False):
        location = str(pattern_or_folder)
        self._tars = sorted(os.path.abspath(path) for path in _tars_of(location, follow_links))
        rows, self._names, self.ignored, self._stamps = [], [], [], []
        for number, tar in enumerate(self._tars):
            self._stamps.append(stamped("", tar)[1])
            samples, ignored = _index_tar(tar)
            self.ignored += ignored
            for key, offset, size, label in samples:
                rows.append((number, offset, size, label))
                self._names.append(key)
        if not rows:
            raise DataError(
                f"there are no samples in {len(self._tars)} .tar files at {location}; expected .tar files of "
                "KEY.jpg and KEY.cls"
            )
        self._index = np.array(rows, dtype=np.int64)  # shard, offset, size, label: small to send to a worker
        self.labels = self._index[:, 3]
        self.class_names = names_of(self.labels, _class_names_beside(Path(self._tars[0]).parent), self.name)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> tuple[bytes, int]:
        number, offset, size, label = self._index[i].tolist()
        data = read_file(self._tars[number], size, offset)
        if len(data) != size:
            raise DataError(f"{self.name(i)} has {len(data)} bytes of {size}: the shard changed; restore it")
        return data, label

    def name(self, i: int) -> str:
        return printable(f"{self._tars[self._index[i, 0]]}:{self._names[i]}")

    def stamp(self, i: int) -> tuple[str, int]:
        number, _, size, label = self._index[i].tolist()
        name = f"{os.path.basename(self._tars[number])}:{self._names[i]}"
        return f"{size} {label} {name}", self._stamps[number]


def are_tars(location: str) -> bool:
    """Whether a location is a glob or a range of shards."""
    return glob.has_magic(location) or RANGE.search(location) is not None


def _tars_of(location: str, follow_links: bool) -> list[str]:
    if os.path.isdir(location):
        with Folder(location, TARS, follow_links) as folder:
            return [os.path.join(location, name) for name in folder.files()]
    if os.path.isfile(location):
        return [location]
    if not RANGE.search(location):
        return glob.glob(location)
    paths = [location]
    while found := RANGE.search(paths[0]):
        first, last = found.groups()
        count = int(last) - int(first) + 1
        if not 0 < count * len(paths) <= MAX_SHARDS:
            raise DataError(f"{location} names {count * len(paths):,} shards, expected 1 to {MAX_SHARDS:,}")
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        paths = [RANGE.sub(number, path, count=1) for path in paths for number in numbers]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards of {location} are missing: {listed(missing, 5)}"
        )
    return paths


def _index_tar(path: str) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """Image member, offset, size and label of every sample, in the order of the images; what is ignored."""
    ignored: list[str] = []
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    refuse_pointer(path)
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                extension, where = extension.lower(), f"{path}:{member.name}"
                if member.isreg() and not 0 <= member.size <= size - member.offset_data:
                    raise DataError(
                        f"{where} would end behind the end of the shard; it is cut off or damaged"
                    )
                is_image = _is_image(tar, member)
                if os.path.basename(key).startswith(".") or not (is_image or extension in (".cls", ".json")):
                    if not member.isdir():
                        ignored.append(f"{os.path.basename(path)}:{member.name}")
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{where} is a link or not a plain file; pack the shard without links")
                if is_image:
                    if key in images:
                        raise DataError(f"{where} is a second image of {key}; expected one for each key")
                    images[key] = (member.name, member.offset_data, member.size)
                elif extension == ".cls" or key not in labels:  # .cls wins
                    if member.size > limits.JSON_BYTES:
                        raise DataError(f"{where} has {member.size} bytes; expected a label")
                    label = _label_in(_read_member(tar, member), extension, where)
                    if label is not None:
                        labels[key] = label
            end = tar.offset
        is_whole = read_file(path, 512, end) == bytes(512)
    except (OSError, tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
        # tarfile answers some headers with these: sizes of 64 bits, names of names of names
        raise DataError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    if not is_whole:  # tarfile takes damage and a cut between members for the end
        raise DataError(f"{path} is damaged or cut off after {end} bytes; restore it")
    for key, (name, *_) in images.items():
        if key not in labels:
            raise DataError(
                f"{path}:{name} has no label; expected {key}.cls or {key}.json with label beside it"
            )
    return [(*images[key], labels[key]) for key in images], ignored


def _is_image(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """By its ending, or by its content where nobody knows the ending."""
    by_ending = IMAGES.by_ending(member.name)
    if by_ending is not None or not member.isreg():
        return bool(by_ending)
    return IMAGES.by_content(_read_member(tar, member, HEAD_BYTES))


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int = -1) -> bytes:
    """The first bytes of a plain file, by default all."""
    file = tar.extractfile(member)
    return b"" if file is None else file.read(most)


def _label_in(data: bytes, extension: str, where: str) -> int | None:
    """The label in a .cls or .json member; None for JSON without one."""
    if extension == ".cls":
        return label_of(data.decode(errors="replace").strip(), where)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict) or "label" not in content:
        return None
    return label_of(content["label"], where)


def _class_names_beside(folder: Path) -> list[str] | None:
    lines, array = folder / "classes.txt", folder / "class_names.json"
    try:
        if lines.is_file():
            if (size := lines.stat().st_size) > limits.INDEX_BYTES:
                raise ValueError(f"it has {size:,} bytes")
            return lines.read_text(encoding="utf-8-sig").strip().splitlines()
        if not array.is_file():
            return None
        names = files.read_json(array, limits.INDEX_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"the class names in {folder} cannot be read: {error}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) and n == printable(n) for n in names):
        raise DataError(f"{array} is not a list of class names")
    return names
