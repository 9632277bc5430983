"""Sources that keep many images in a file: tar shards and Hugging Face data; see
:mod:`iwin_dit.data.sources`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from iwin_dit.data.folders import listed, printable
from iwin_dit.data.formats import ENDINGS
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")


class WebDatasetSource:
    """Tar shards as of WebDataset: ``KEY.jpg`` (or another image) with ``KEY.cls``, an integer, or
    ``KEY.json`` with an integer ``label``.

    Class names are the lines of ``classes.txt`` or the list in ``class_names.json`` beside the first shard,
    otherwise the numbers. Nothing is extracted: the offsets are indexed once.

    Args:
        pattern_or_folder: a .tar file, a folder of them or a glob; they are read in sorted order.

    Raises:
        DataError: where there are no samples, a shard is damaged or a label is missing or makes no sense.
    """

    def __init__(self, pattern_or_folder: str | Path):
        location = str(pattern_or_folder)
        if os.path.isdir(location):
            found = glob.glob(os.path.join(glob.escape(location), "*.tar"))
        else:
            found = [location] if os.path.isfile(location) else glob.glob(location)
        self._tars = sorted(os.path.abspath(path) for path in found)
        rows, self._names, self.ignored = [], [], []
        for number, tar in enumerate(self._tars):
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
        named = _class_names_beside(Path(self._tars[0]).parent)
        top = int(self._index[:, 3].max())
        if named is not None and top >= len(named):
            i = int(self._index[:, 3].argmax())
            raise DataError(
                f"{self.name(i)} has label {top}, but beside it only {len(named)} classes are named"
            )
        self.class_names = [str(i) for i in range(top + 1)] if named is None else named

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> tuple[bytes, int]:
        number, offset, size, label = self._index[i].tolist()
        try:
            with open(self._tars[number], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{self.name(i)} cannot be read: {error}") from error
        if len(data) != size:
            raise DataError(f"{self.name(i)} has {len(data)} bytes of {size}: the shard changed; restore it")
        return data, label

    def name(self, i: int) -> str:
        return printable(f"{self._tars[self._index[i, 0]]}:{self._names[i]}")

    def fingerprint(self, i: int) -> str:
        number, _, size, label = self._index[i].tolist()
        return f"{size} {label} {os.path.basename(self._tars[number])}:{self._names[i]}"


class HuggingFaceSource:
    """A dataset of the Hugging Face hub or a folder of parquet files, by the package ``datasets``.

    The image is the first column of images, the label the first of class labels, or integers named label.

    Raises:
        DataError: where the package, the data or one of the columns is missing.
    """

    def __init__(self, name_or_path: str | Path, split: str = "train"):
        try:
            import datasets
        except ImportError:
            raise DataError(f"{name_or_path} needs a package: pip install 'iwin-dit[datasets]'") from None
        self.location = str(name_or_path)
        self._is_local = os.path.isdir(self.location)
        try:
            if self._is_local:
                parquet = _parquet_files(self.location, split)
                paths = [os.path.relpath(file, self.location) for file in parquet]
                self._version = " ".join(sized(self.location, path) for path in paths)
                data = datasets.load_dataset("parquet", data_files={split: parquet}, split=split)
            else:
                data = datasets.load_dataset(self.location, split=split)
                self._version = f"{data.info.version} {data.info.dataset_size}"
        except DataError:
            raise
        except Exception as error:  # the package raises its own, the hub's, pyarrow's and Python's
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"the split {split} of {self.location} cannot be loaded ({reason})") from error
        features = data.features
        image = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        label = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if not label and "int" in getattr(features.get("label"), "dtype", ""):
            label = ["label"]
        if not image or not label or not len(data):
            raise DataError(
                f"{self.location} has {len(data)} rows of {dict(features)}; expected a column of images and "
                "one of class labels or integers named label"
            )
        column = data.select_columns(label[:1]).with_format("arrow")[:][label[0]]
        self._labels = [
            label_of(value, f"{self.location}, row {i}") for i, value in enumerate(column.to_pylist())
        ]
        self.class_names = list(getattr(features[label[0]], "names", None) or ())
        if not self.class_names:
            self.class_names = [str(i) for i in range(max(self._labels) + 1)]
        self._column, self.ignored = image[0], []
        self._images = data.select_columns(image[:1]).cast_column(image[0], datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, i: int) -> tuple[bytes, int]:
        image: dict[str, Any] | None = self._images[i][self._column]
        if image is None or (image["bytes"] is None and (self._is_local or not image["path"])):
            # a path in a stranger's parquet could point anywhere
            raise DataError(f"{self.name(i)} holds no image; remove the row or store the bytes in the file")
        data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
        return data, self._labels[i]

    def name(self, i: int) -> str:
        return f"{self.location}, row {i}"

    def fingerprint(self, i: int) -> str:
        return f"{self._labels[i]} {i} {self._version}"  # of all rows together: none has a size of its own


def _index_tar(path: str) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """Image member, offset, size and label of every sample, in the order of the images; what is ignored."""
    ignored: list[str] = []
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                extension = extension.lower()
                is_image = extension in ENDINGS
                if os.path.basename(key).startswith(".") or not (is_image or extension in (".cls", ".json")):
                    if not member.isdir():
                        ignored.append(f"{os.path.basename(path)}:{member.name}")
                    continue
                where = f"{path}:{member.name}"
                if not member.isreg() or member.issparse():
                    raise DataError(f"{where} is a link or not a plain file; pack the shard without links")
                if is_image:
                    if key in images:
                        raise DataError(f"{where} is a second image of {key}; expected one for each key")
                    images[key] = (member.name, member.offset_data, member.size)
                elif extension == ".cls" or key not in labels:  # .cls wins
                    if member.size > limits.JSON_BYTES:
                        raise DataError(f"{where} has {member.size} bytes; expected a label")
                    label = _label_in(tar.extractfile(member).read(), extension, where)
                    if label is not None:
                        labels[key] = label
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            is_whole = file.read(512) == bytes(512)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:  # sizes of more than 64 bits
        raise DataError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    if not is_whole:  # tarfile takes damage and a cut between members for the end
        raise DataError(f"{path} is damaged or cut off after {end} bytes; restore it")
    for key, (name, *_) in images.items():
        if key not in labels:
            raise DataError(
                f"{path}:{name} has no label; expected {key}.cls or {key}.json with label beside it"
            )
    return [(*images[key], labels[key]) for key in images], ignored


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


def label_of(value: object, where: str) -> int:
    """A label from an integer or its text."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limits.CLASSES:
        raise DataError(
            f"{where}: found label {str(value)[:40]!r}, expected an integer from 0 to {limits.CLASSES - 1}"
        )
    return value


def _class_names_beside(folder: Path) -> list[str] | None:
    lines, array = folder / "classes.txt", folder / "class_names.json"
    try:
        if lines.is_file():
            return lines.read_text(encoding="utf-8-sig").strip().splitlines()
        if not array.is_file():
            return None
        names = json.loads(array.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"the class names in {folder} cannot be read: {error}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) and n == printable(n) for n in names):
        raise DataError(f"{array} is not a list of class names")
    return names


def _parquet_files(folder: str, split: str) -> list[str]:
    """The parquet files of a split: those whose path names it, or all where no path names any split."""
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.parquet"), recursive=True))
    words = [set(re.split(r"[/_.-]+", os.path.relpath(path, folder).lower())) for path in found]
    chosen = [path for path, of_path in zip(found, words, strict=True) if split in of_path]
    if not chosen and not any(of_path & set(SPLITS) for of_path in words):
        chosen = found
    if not chosen:
        names = [os.path.relpath(path, folder) for path in found]
        raise DataError(f"there are no parquet files of the split {split} in {folder}; found {listed(names)}")
    return chosen


def read_file(path: str) -> bytes:
    try:
        return files.read_bytes(path)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error


def sized(root: str, file: str) -> str:
    """The size of a file and its path below ``root``, for fingerprints: a copy elsewhere has the same."""
    path = os.path.join(root, file)
    try:
        return f"{os.path.getsize(path)} {file}"
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
