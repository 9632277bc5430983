"""Writing files so that they are complete or absent, and survive a power loss."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from iwin_dit.runtime.errors import ConfigError, DataError, StorageError, UserError, reason

T = TypeVar("T")
# what a network file system or a tired disk answers once, and may not answer again
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EAGAIN}
PAUSES = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth try


def retry(read: Callable[[], T]) -> T:
    """Calls ``read``; after an error of the storage that may pass, calls it again after growing pauses.

    Raises:
        OSError: the last error, or at once one that will not pass.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(pause)
    return read()


def cannot_read(name: str, error: OSError) -> UserError:
    """The error of data that could not be read: of the storage, where it may pass, otherwise of the data."""
    kind = StorageError if error.errno in TRANSIENT else DataError
    return kind(f"{name} cannot be read: {error.strerror or error}")


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, with :func:`retry`."""
    return retry(Path(path).read_bytes)


def umask() -> int:
    """The permissions that this process takes from the files it makes."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def follow_umask(folder: Path) -> None:
    """Lets those read the files of a folder, which was just written, whom the umask lets read.

    safetensors makes its files readable by their owner alone.
    """
    mode = 0o666 & ~umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)


def write(path: Path, data: bytes) -> dict[str, Any]:
    """Writes and fsyncs a new file; returns its size and SHA-256.

    Raises:
        OSError: naming the file, of which nothing stays, so that a full disk does not stay full.
    """
    file = open(path, "wb")  # noqa: SIM115
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
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
    fsync(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Makes a finished temporary directory visible under its final name; its files follow the umask."""
    follow_umask(temporary)
    fsync(temporary)
    os.rename(temporary, final)
    fsync(final.parent)


def forget(path: Path) -> None:
    """Asks the system to keep nothing of a file in memory, so that the next read comes from the storage."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_writable(path: Path, name: str, is_file: bool = False) -> None:
    """Refuses a path where no folder may be made or filled, or no file made or replaced; makes nothing.

    Args:
        name: of the option or the key that gives the path.

    Raises:
        ConfigError: where nothing may be written there.
    """
    try:
        is_there = is_file and path.exists()
        place = path if is_there else _existing(path)
        fits = (place.is_file() if is_there else place.is_dir()) and os.access(place, os.W_OK)
    except OSError:  # a name that is too long
        fits = False
    if not fits:
        raise ConfigError(f"{name} {path} cannot be written; take a path in a folder that is yours")


def free_bytes(path: Path) -> int:
    """Bytes that this process may still write to the file system of ``path``, which need not exist yet."""
    usage = shutil.disk_usage(_existing(path))
    return usage.free if usage.total else sys.maxsize  # some network mounts do not say


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def in_units(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    unit = 0
    while count >= 1024 and unit < 4:
        count, unit = count / 1024, unit + 1
    return f"{count:,.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}" if unit else f"{count:,.0f} bytes"


def fsync(path: Path) -> None:
    """Brings to the disk a file that another writer has closed, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Hides a directory under another name, which nothing has, in one step; returns the new path."""
    hidden = Path(tempfile.mkdtemp(prefix=f".old-{path.name}-", dir=path.parent))
    os.rename(path, hidden)
    return hidden


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file, of which ``data`` are the first bytes, only stands for one that Git LFS keeps.

    ``git lfs pull`` replaces such pointers by their files. Its specification fixes the first line.
    """
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def why_unreadable(path: Path, error: Exception) -> str:
    """The cause of an error that came when a file was read: a pointer of Git LFS, or :func:`reason`."""
    try:
        with open(path, "rb") as file:
            pointer = is_lfs_pointer(file.read(64))
    except OSError as cause:  # the first cause: a library may have hidden it
        return reason(cause)
    if pointer:
        return "it is a pointer of Git LFS in place of the file; git lfs pull fetches the file itself"
    return reason(error)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, max_bytes: int) -> Any:
    """The value in a JSON file that anybody may have made.

    Raises:
        ValueError: where it is larger than ``max_bytes``, which is found before parsing, or is not JSON.
        OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {in_units(max_bytes)}")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:  # whose own representation holds the whole file
        raise ValueError(str(error)) from None


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """As :func:`read_json`, with :func:`retry`, of a file that has to hold keys and values."""
    value = retry(partial(read_json, path, max_bytes))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected keys and values")
    return value
