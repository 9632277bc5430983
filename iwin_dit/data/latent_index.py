"""``index.json`` of a set of latents. Anybody may have written it: every field is checked when it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError, StorageError

FORMAT = 1
SHARD_NAME = re.compile(r"latents_rank\d{2,}_shard\d{3,}\.safetensors", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
MOST = 1 << 16  # channels, frames and sides
LARGEST = 1e30  # of statistics, which become float32
SMALLEST_STD = 1e-6  # of a mean: below, it is what rounding leaves of a constant


def read_index(directory: Path) -> dict[str, Any]:
    """``index.json``, its fields checked.

    Raises:
        DataError: where it is missing or not ours.
        StorageError: where it cannot be read.
    """
    path = directory / "index.json"
    try:
        index = files.read_object(path, limits.INDEX_BYTES)
        if index.get("format") != FORMAT:
            raise ValueError(f"it has format {index.get('format')!s:.40}, this version reads {FORMAT}")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"there are no latents in {directory}: {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} is not an index of latents: {error}") from None
    check_index(index, str(path))
    return index


def check_index(index: dict[str, Any], where: str) -> None:
    """That all fields are what they have to be, and that no channel is constant.

    Raises:
        DataError: naming the field, with what was found and what was expected.
    """
    for key, (fits, expected) in FIELDS.items():
        if key not in index:
            if key not in OPTIONAL:
                raise DataError(f"{where} is not an index of latents: it lacks {key}")
        elif not fits(index[key]):
            raise DataError(f"{where}: {key} is {index[key]!r:.100}, expected {expected}")
    for shard in index["shards"]:
        if not _is_shard(shard):
            raise DataError(
                f"{where} names {shard!r:.200}, which is no shard of latents; expected the name of a file in "
                "this folder, such as latents_rank00_shard000.safetensors, and its count"
            )
    names = [shard["file"] for shard in index["shards"]]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where} names the shard {twice} twice; extract the latents again")
    count = sum(shard["count"] for shard in index["shards"])
    if index.get("num_images", count) != count:
        raise DataError(f"{where}: num_images is {index['num_images']}, its shards have {count} together")
    channels = index["latent_shape"][0]
    for key in ("mean", "std"):
        if len(index[key]) != channels:
            raise DataError(f"{where}: {key} has {len(index[key])} numbers, the latents {channels} channels")
    for channel, (mean, std) in enumerate(zip(index["mean"], index["std"], strict=True)):
        if "teacher" in index:
            break  # features may have channels that are silent here, and are not normalised
        if std <= SMALLEST_STD * abs(mean):  # the values differ by no more than rounding
            raise DataError(
                f"{where}: channel {channel} of the latents is constant (mean {mean:.6g}, std {std:.3g}), so "
                "that it cannot be normalised and holds nothing to learn; extract again with another "
                "autoencoder or --precision float32"
            )


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or "\0" in value:
        return False
    return value == value.encode(errors="replace").decode()  # JSON can hold halves of characters


def _is_count(value: Any, least: int = 1, most: int = 1 << 48) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # NaN is not


def _is_shard(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("file"), str):
        return False
    hashed = value.get("sha256")
    return (
        SHARD_NAME.fullmatch(value["file"]) is not None
        and _is_count(value.get("count"))
        and ("bytes" not in value or _is_count(value["bytes"]))
        and (hashed is None or (isinstance(hashed, str) and SHA256.fullmatch(hashed) is not None))
    )


def _all(fits: Callable[[Any], bool], most: int = limits.CLASSES) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 0 < len(value) <= most and all(map(fits, value))


def _is_shape(value: Any) -> bool:
    sides = _all(lambda side: _is_count(side, most=MOST), most=4)
    return sides(value) and len(value) >= 3 and math.prod(value) <= 1 << 40


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "vae": (_is_text, "the name or folder of an autoencoder"),
    "vae_sha256": (lambda value: value is None or _is_text(value), "a hash"),
    "class_names": (_all(_is_text), "a list of names"),
    "latent_shape": (_is_shape, "channels, height and width, or channels, frames, height and width"),
    "mean": (_all(_is_number), "a finite number for each channel"),
    "std": (_all(lambda value: _is_number(value) and value >= 0), "a finite number for each channel"),
    "shards": (_all(lambda value: isinstance(value, dict)), "a list of shards"),
    "image_size": (_all(_is_count, most=2), "height and width"),
    "num_images": (_is_count, "a number of images"),
    "frames": (_is_count, "a number of frames"),
    "frame_stride": (_is_count, "a number of frames"),
    "background": (lambda value: value is None or _is_text(value), "a colour"),
    "teacher": (_is_text, "the network whose features they are"),
    "source": (lambda value: isinstance(value, dict), "what the latents were made of"),
}
OPTIONAL = {"vae_sha256", "image_size", "num_images", "frames", "frame_stride", "background", "teacher"}
OPTIONAL |= {"source"}
