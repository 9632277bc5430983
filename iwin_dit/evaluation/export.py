"""Drawn images on disk, as other evaluators take them: a folder of PNGs, or ADM's ``.npz``.

They are written chunk by chunk, by whichever process drew them, before the chunk's features are: so what is
there is complete, and what is missing is drawn again. Files are on disk before they get their names, so that
a power loss leaves none that is empty.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from iwin_dit.evaluation.images import Images
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError


class PngFolder:
    """``000000.png``, ... in a folder; each is complete or absent, and those that are there are kept."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.digits = folder, max(6, len(str(count - 1)))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:0{self.digits}d}.png"

    def has(self, start: int, stop: int) -> bool:
        return all(self._is_there(number) for number in range(start, stop))

    def _is_there(self, number: int) -> bool:
        path = self._path(number)
        return path.exists() and path.stat().st_size > 0  # an older version did not wait for the disk

    def write(self, start: int, images: Tensor) -> None:
        """Images ``(n, 3, H, W)`` uint8, the first of which is number ``start``."""
        written = {}
        for number, pixels in enumerate(images.movedim(1, -1).cpu().numpy(), start):
            if not self._is_there(number):
                path = self._path(number)
                written[path] = path.with_name(f".tmp-{path.name}")
                Image.fromarray(pixels).save(written[path], format="PNG")
        for temporary in written.values():  # which takes less time than to wait for each in turn
            files.fsync(temporary)
        for path, temporary in written.items():
            os.replace(temporary, path)
        files.fsync(self.folder)

    def finish(self) -> None:
        pass


class NpzFile:
    """``arr_0`` of an ``.npz``, uint8 ``(N, H, W, 3)``, joined from a file per chunk in another folder.

    No more than a chunk is in memory.
    """

    def __init__(self, path: Path, count: int, parts: Path):
        self.path, self.count, self.parts = path, count, parts

    def _part(self, start: int) -> Path:
        return self.parts / f"images-{start:08d}.npy"

    def has(self, start: int, stop: int) -> bool:
        return self._part(start).exists()

    def write(self, start: int, images: Tensor) -> None:
        data = io.BytesIO()
        np.save(data, np.ascontiguousarray(images.movedim(1, -1).cpu().numpy()))
        files.replace(self._part(start), data.getvalue())

    def finish(self) -> None:
        """Once, after the last chunk of any process."""
        temporary, start = self.parts / self.path.name, 0
        # a ZipInfo of its own has no date: the same images make the same file
        with (
            zipfile.ZipFile(temporary, "w") as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file,
        ):
            while start < self.count:
                part = np.load(self._part(start))
                if start == 0:
                    header = dict(descr="|u1", fortran_order=False, shape=(self.count, *part.shape[1:]))
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part.data)
                start += len(part)
        files.fsync(temporary)
        os.replace(temporary, self.path)
        files.fsync(self.path.parent)


Export = PngFolder | NpzFile  # ``has`` and ``write`` are called for the same chunks in each run


def open_export(target: Path, images: Images, parts: Path) -> Export:
    """A folder, or a file by its ``.npz``, for these images; their recipe is written in it, or beside it.

    Args:
        target: new, or what an earlier call for the same images left there.
        parts: a folder of this process, on the same file system, for what is needed for a while.

    Raises:
        ConfigError: where other images, or other files, are there.
    """
    packed = target.suffix == ".npz"
    recipe = target.with_name(f"{target.name}.recipe.json") if packed else target / "recipe.json"
    known = None  # the fingerprint of the images that are there
    with contextlib.suppress(OSError, ValueError):
        known = files.read_object(recipe, limits.JSON_BYTES).get("sha256")
    is_empty = not target.exists() or (not packed and target.is_dir() and not any(target.iterdir()))
    is_foreign = packed and recipe.exists() and known is None
    if is_foreign or (not is_empty and known != images.fingerprint):
        raise ConfigError(
            f"--save-images {target} is there already and not of this evaluation; remove it, or give another"
        )
    (parts if packed else target).mkdir(parents=True, exist_ok=True)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    if known != images.fingerprint:
        files.replace(recipe, files.to_json(images.description | {"sha256": images.fingerprint}))
    return NpzFile(target, len(images), parts) if packed else PngFolder(target, len(images))
