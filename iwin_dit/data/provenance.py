"""Which images or clips a shard of latents was made of: names, labels, sizes, times and contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iwin_dit.data.latents import LatentDataset
from iwin_dit.data.sources import identity_of
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import progress


def stamps(source: Any, chosen: range) -> dict[str, str]:
    """Of some images, without reading them: a hash of names, labels and sizes, and one of times."""
    found = [source.stamp(i) for i in chosen]
    names = "\0".join(fingerprint for fingerprint, _ in found)
    times = "\0".join(str(modified) for _, modified in found)
    return {
        "images_sha256": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        "times_sha256": hashlib.sha256(times.encode()).hexdigest(),
    }


def content_sha256(hashes: Iterable[str]) -> str | None:
    """Of a shard, from those of its images' files; None where one is not known, as of a broken image."""
    hashes = list(hashes)
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if all(hashes) else None


def source_of(source: Any, shard_images: int) -> dict[str, Any]:
    """For the index: the identity by which training knows these images too, and how they were divided."""
    found = {key: value for key, value in identity_of(source).items() if key != "classes"}
    return found | {"shard_images": shard_images}


def verify_content(folder: Path, source: Any, location: str) -> int:
    """Reads every image of the source again and compares it with what the latents were made of.

    Args:
        location: what to call the source in an error.

    Returns:
        How many shards were compared by content; others, of clips or with broken images, by name, label and
        size alone.

    Raises:
        DataError: naming the shards that were made of other images.
    """
    index = LatentDataset(folder).index
    made_of = index.get("source") or {}
    size = made_of.get("shard_images")
    if type(size) is not int or size < 1:
        raise DataError(f"{folder} was extracted by an earlier version, which did not write down of what")
    now = identity_of(source)
    for key, what in (("images", "images"), ("files_sha256", "images, by name, label or size")):
        if now[key] != made_of.get(key):
            raise DataError(
                f"{location} holds other {what} than {folder} was made of; restore them, or extract"
            )
    other, compared = [], 0
    for shard in progress(index["shards"], unit="shard", desc="contents"):
        if shard.get("content_sha256") is None:
            continue
        start = int(shard["file"].rpartition("shard")[2].partition(".")[0]) * size
        chosen = range(start, min(start + size, len(source)))
        found = content_sha256(hashlib.sha256(source.read(i)[0]).hexdigest() for i in chosen)
        compared += 1
        if found != shard["content_sha256"]:
            other.append(shard["file"])
    if other:
        raise DataError(
            f"{len(other)} shards of {folder} were made of images whose content has changed: "
            f"{', '.join(other[:10])}; remove these files and run the extraction again"
        )
    return compared
