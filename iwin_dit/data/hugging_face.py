"""Images of Hugging Face data: of the hub, folders of parquet files, and what ``save_to_disk`` wrote."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from iwin_dit.data.classes import SPLITS, classes_of, label_of, names_of
from iwin_dit.data.folders import Wanted, list_files, read_file, refuse_pointer, stamped
from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import DataError, listed, printable

PARQUET = Wanted(frozenset({".parquet"}), frozenset())
TINY_IMAGE_BYTES = 32  # fewer than any image takes
BOMB = "it would fill memory and disk, so it is not opened; store each image once, as a file of its own size"


def is_saved(folder: str) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote this folder, or that of a ``DatasetDict``."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def is_of_datasets(folder: str) -> bool:
    """Whether a folder was saved so, or holds parquet files, directly or in ``data``."""
    below = (glob.glob(os.path.join(glob.escape(folder), *name, "*.parquet")) for name in ((), ("data",)))
    return is_saved(folder) or any(below)


class HuggingFaceSource:
    """A dataset of the Hugging Face hub or a folder of parquet or saved files, by the package ``datasets``.

    Args:
        name_or_path: a name on the hub, or a folder.
        split: of the dataset. Default: ``train``.
        image_column: a column of images. Default: the only one.
        label_column: a column of class labels, integers or texts. Default: the only one of class labels, or
            one that is named ``label``.
        follow_links: links in a folder of parquet files may lead out of it.

    Raises:
        DataError: where the package, the data or one of the columns is missing, or a label makes no sense.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        follow_links: bool = False,
    ):
        self.location = str(name_or_path)
        self.ignored: list[str] = []
        self._is_local = os.path.isdir(self.location)
        data = self._load(split, follow_links)
        features = data.features
        images = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
        dtypes = {key: getattr(feature, "dtype", "") for key, feature in features.items()}
        labels = [key for key, dtype in dtypes.items() if re.match("u?int|string|large_string", dtype)]
        if label_column is None:
            labels = [key for key in labels if hasattr(features[key], "names")] or [*{"label"} & set(labels)]
        self._column = _column(self.location, features, images, image_column, "images", "--image-column")
        what = "class labels, or integers or texts named label"
        label = _column(self.location, features, labels, label_column, what, "--label-column")
        if not len(data):
            raise DataError(f"{self.location} has no rows; give another split")
        column = data.select_columns([label]).with_format("arrow")[:][label].to_pylist()
        places = [self.name(i) for i in range(len(column))]
        if "string" in dtypes[label]:
            self.class_names, self.labels = classes_of(column, places)
        else:
            self.labels = [label_of(value, place) for value, place in zip(column, places, strict=True)]
            named = getattr(features[label], "names", None)
            self.class_names = names_of(self.labels, named, self.name)
        encoded = type(features[self._column])(decode=False)
        self._images = data.select_columns([self._column]).cast_column(self._column, encoded)

    def _load(self, split: str | None, follow_links: bool) -> Any:
        """The rows; sets what tells them from others."""
        try:
            import datasets
        except ImportError:
            raise DataError(f"{self.location} needs a package: pip install 'iwin-dit[datasets]'") from None
        try:
            if not self._is_local:
                data = datasets.load_dataset(self.location, split=split or "train")
                self._version, self._modified = f"{data.info.version} {data.info.dataset_size}", 0
                return data
            if is_saved(self.location):
                data = _of_split(datasets.load_from_disk(self.location), self.location, split)
                paths = sorted(file["filename"] for file in data.cache_files)
            else:
                paths = _parquet_files(self.location, split or "train", follow_links)
                for path in paths:
                    _check_parquet(path)
                data = datasets.load_dataset("parquet", data_files={"train": paths}, split="train")
        except DataError:
            raise
        except Exception as error:  # the package raises its own, the hub's, pyarrow's and Python's
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(
                f"the split {split or 'train'} of {self.location} cannot be loaded ({reason})"
            ) from error
        stamps = [stamped(self.location, os.path.relpath(path, self.location)) for path in paths]
        self._version = " ".join(stamp for stamp, _ in stamps)
        self._modified = max((modified for _, modified in stamps), default=0)
        return data

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> tuple[bytes, int]:
        image: dict[str, Any] | None = self._images[i][self._column]
        if image is None or (image["bytes"] is None and (self._is_local or not image["path"])):
            # a path in a stranger's parquet could point anywhere
            raise DataError(f"{self.name(i)} holds no image; remove the row or store the bytes in the file")
        data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
        return data, self.labels[i]

    def name(self, i: int) -> str:
        return f"{self.location}, row {i}"

    def stamp(self, i: int) -> tuple[str, int]:
        """Of all rows together: none has a size or a time of its own."""
        return f"{self.labels[i]} {i} {self._version}", self._modified


def _column(
    location: str, features: Any, found: list[str], wanted: str | None, what: str, option: str
) -> str:
    """The wanted column among those found, or the only one."""
    if wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    columns = ", ".join(f"{key} ({getattr(f, 'dtype', type(f).__name__)})" for key, f in features.items())
    if wanted is not None:
        raise DataError(f"{location} has no column {wanted} of {what}; found {columns}")
    raise DataError(
        f"{location} has {len(found)} columns of {what}, expected one; choose by {option} (in a recipe, "
        f"data.{option[2:].replace('-', '_')}) among {columns}"
    )


def _of_split(saved: Any, folder: str, split: str | None) -> Any:
    """The rows of a split in what ``save_to_disk`` wrote, which may be the rows of one alone."""
    if isinstance(saved, dict):
        if (split or "train") not in saved:
            raise DataError(
                f"{folder} has no split {split or 'train'}; found {listed(sorted(saved))}; choose by --split"
            )
        return saved[split or "train"]
    if split is not None and str(saved.split) != split:
        raise DataError(f"{folder} is of the split {saved.split}, not of {split}; leave --split out")
    return saved


def _parquet_files(folder: str, split: str, follow_links: bool) -> list[str]:
    """The parquet files of a split: those whose path names it, or all where no path names any split."""
    found = sorted(list_files(folder, PARQUET, follow_links).files)
    words = [set(re.split(r"[/_.-]+", path.lower())) for path in found]
    chosen = [path for path, of_path in zip(found, words, strict=True) if split.lower() in of_path]
    if not chosen and not any(of_path & set(SPLITS) for of_path in words):
        chosen = found
    if not chosen:
        raise DataError(f"there are no parquet files of the split {split} in {folder}; found {listed(found)}")
    return [os.path.join(folder, path) for path in chosen]


def _check_parquet(path: str) -> None:
    """That a file does not become far more than it is, which its footer tells.

    Raises:
        DataError: where it does, or is a pointer of Git LFS.
    """
    from pyarrow import parquet

    refuse_pointer(path)
    size, where = os.path.getsize(path), printable(path)
    with parquet.ParquetFile(path) as file:
        if file.metadata.num_rows > size:  # a label that is repeated takes no room at all
            raise DataError(f"{where} has {file.metadata.num_rows:,} rows in {size:,} bytes; {BOMB}")
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            for chunk in map(group.column, range(group.num_columns)):
                packed, becomes = chunk.total_compressed_size, chunk.total_uncompressed_size
                most = limits.inflated(packed)
                repeats = chunk.has_dictionary_page and packed < TINY_IMAGE_BYTES * chunk.num_values
                if repeats and becomes <= most < becomes * chunk.num_values:
                    becomes = _repeated_bytes(file, number, chunk.path_in_schema, becomes, most)
                if becomes > most:
                    raise DataError(f"{where} becomes more than {most:,} bytes from {packed:,}; {BOMB}")


def _repeated_bytes(file: Any, group: int, column: str, largest: int, most: int) -> int:
    """Bytes of a column whose rows repeat values of up to ``largest`` bytes; counted until above ``most``."""
    total = 0
    for batch in file.iter_batches(max(1, most // max(1, largest)), row_groups=[group], columns=[column]):
        total += sum(_bytes(values) for values in batch.columns)
        if total > most:
            break
    return total


def _bytes(values: Any) -> int:
    """Of an array of Arrow, each value on its own."""
    import pyarrow

    if isinstance(values, pyarrow.DictionaryArray):
        values = values.dictionary_decode()
    return sum(map(_bytes, values.flatten())) if isinstance(values, pyarrow.StructArray) else values.nbytes
