"""Images that a pipeline draws when they are asked for, as a set that metrics compare, and on disk.

There other evaluators take them: a folder of PNGs, or ADM's ``.npz``. They are written chunk by chunk, by
whichever process drew them, before the chunk's features are: so what is there is complete, and what is
missing is drawn again. Files are on disk before they get their names, so that a power loss leaves none that
is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iwin_dit.evaluation.images import Images
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.sampling import draw_in_parts
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.seeds import generator

Draw = Callable[[list[int], list[torch.Generator]], Tensor]


def drawer(pipeline: ClassConditionalPipeline, options: dict[str, Any]) -> Draw:
    """``draw(labels, generators)``: uint8 images ``(B, 3, H, W)``, or clips ``(B, 3, T, H, W)``.

    They are rounded as saving a PNG rounds them. A batch that does not fit into memory is drawn in parts.

    Raises, when called:
        ConfigError: where the pipeline refuses the options.
        DataError: where the model draws what is not finite.
    """

    def draw(labels: list[int], generators: list[torch.Generator]) -> Tensor:
        try:
            (images,) = pipeline(labels, generator=generators, output_type="pt", return_dict=False, **options)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if images.ndim == 5:  # (B, T, 3, H, W)
            images = images.transpose(1, 2)
        if not torch.isfinite(images).all():
            raise DataError("the model draws images that are not finite; its weights are not usable")
        return (images.float() * 255).round().to(torch.uint8)

    return lambda labels, generators: torch.cat(draw_in_parts(draw, labels, generators))


class SampledImages:
    """What a pipeline draws: image i is of class ``plan(i)``, from a seed of its own.

    Args:
        draw: ``draw(labels, generators) -> (n, 3, H, W)`` uint8, rounded as a saved PNG is.
        labels: of the images; see :func:`label_plan`.
        seed: with the label and its number among those of the class, of the noise.
        recipe: all that the images depend on, for the fingerprint and the result.
        draw_batch: images that are drawn together, in groups that do not depend on what is read: in float32
            the rounding of a matrix product depends on the batch, and with it a pixel in 10^5.
    """

    def __init__(
        self,
        draw: Draw,
        labels: Sequence[int],
        seed: int,
        recipe: dict[str, Any],
        draw_batch: int = 32,
    ):
        self.draw, self.labels, self.seed, self.draw_batch = draw, list(labels), seed, draw_batch
        self.workers = 0
        self._group: tuple[int, Tensor] | None = None  # the last one: its number and its images
        seen: Counter[int] = Counter()
        self.numbers = []  # of each among those of its class
        for label in self.labels:
            self.numbers.append(seen[label])
            seen[label] += 1
        self.description = recipe | {"images": len(self), "seed": seed, "draw_batch": draw_batch}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> Tensor:
        size = self.draw_batch
        groups = [self._draw(group) for group in range(start // size, -(-stop // size))]
        first = start // size * size
        return torch.cat(groups)[start - first : stop - first]

    def _draw(self, group: int) -> Tensor:
        if self._group is None or self._group[0] != group:
            chosen = slice(group * self.draw_batch, (group + 1) * self.draw_batch)
            labels, numbers = self.labels[chosen], self.numbers[chosen]
            seeds = [generator(self.seed, "image", *which) for which in zip(labels, numbers, strict=True)]
            self._group = group, self.draw(labels, seeds)
        return self._group[1]

    @cached_property
    def fingerprint(self) -> str:
        content = repr((sorted(self.description.items(), key=str), self.labels))
        return hashlib.sha256(content.encode()).hexdigest()


def label_plan(plan: str, num_images: int, num_classes: int, seed: int) -> list[int]:
    """The class of each image.

    Args:
        plan: ``equal``: the classes in turn, so that each has as many; ``uniform``: drawn at random.

    Raises:
        ConfigError: where it is empty.
    """
    if num_images < 1 or num_classes < 1:
        raise ConfigError(
            f"there is nothing to draw: {num_images} images of {num_classes} classes; each must be 1 or more"
        )
    if plan == "equal":
        return [i % num_classes for i in range(num_images)]
    return torch.randint(num_classes, (num_images,), generator=generator(seed, "labels")).tolist()


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
