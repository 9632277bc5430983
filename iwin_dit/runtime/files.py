"""Writing files so that they are complete or absent, and survive a power loss."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes) -> dict[str, Any]:
    """Writes and fsyncs a new file; returns its size and SHA-256."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest(data)


def digest(data: bytes) -> dict[str, Any]:
    """Size and SHA-256, as manifests and indexes hold them."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file on disk, in the form of :func:`digest`."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": found}


def replace(path: Path, data: bytes) -> None:
    """Replaces a file in one step: readers see the old bytes or the new ones."""
    temporary = path.with_name(f".tmp-{path.name}")
    write(temporary, data)
    os.replace(temporary, path)
    fsync_directory(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Makes a finished temporary directory visible under its final name."""
    fsync_directory(temporary)
    os.rename(temporary, final)
    fsync_directory(final.parent)


def can_write(path: Path) -> bool:
    """Whether a file (a path with a suffix) or a folder may be made at ``path``, without making anything."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if existing == path and path.suffix:
        return path.is_file() and os.access(path, os.W_OK)
    return existing.is_dir() and os.access(existing, os.W_OK)


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    shutil.rmtree(path)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
