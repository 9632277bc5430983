"""What an extraction keeps beside its shards, in ``.entries``: its settings, and an entry for each shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwin_dit.data.latents import SHARD_NAME
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError

ENTRIES = ".entries"


def check_is_ours(out: Path) -> None:
    """Published latents, or those of the quickstart, have shards of the same names: they are kept.

    Raises:
        DataError: where ``out`` holds latents that were not begun there.
    """
    if settings_path(out).exists() or not out.is_dir():
        return
    found = [p.name for p in out.iterdir() if p.name == "index.json" or SHARD_NAME.fullmatch(p.name)]
    if found:
        raise DataError(f"{out} holds latents that were not begun here ({min(found)}); take another folder")


def settings_path(out: Path) -> Path:
    return out / ENTRIES / "settings.json"


def entry_path(out: Path, number: int) -> Path:
    return out / ENTRIES / f"shard{number:03d}.json"


def read_entry(out: Path, number: int) -> dict[str, Any] | None:
    """The entry of a finished shard whose file is still there.

    Raises:
        DataError: where it is damaged.
    """
    path = entry_path(out, number)
    if not path.exists():
        return None
    entry = read_record(path)
    count, file, bad = entry.get("count"), entry.get("file", ""), entry.get("bad")
    if type(count) is not int or not isinstance(file, str) or not isinstance(bad, list):
        raise DataError(f"{path} is not the entry of a shard; remove it, and the shard is made again")
    path = out / file
    is_whole = not count or (path.is_file() and path.stat().st_size == entry.get("bytes"))
    return entry if is_whole else None


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file in ``.entries``.

    Raises:
        DataError: where it is damaged.
    """
    try:
        return files.read_object(path, limits.INDEX_BYTES)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it, or extract into another folder") from None
