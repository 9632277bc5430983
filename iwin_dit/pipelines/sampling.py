"""Images of classes, each from a seed of its own: image k of a class is the same whatever the batch size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.runtime import files
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import generator

SMALLEST_SIDE = 64  # of an image in a grid, in pixels


class Sample(NamedTuple):
    """Image ``number`` of a class, or of a named row."""

    label: int | str
    number: int
    image: Image.Image


def sample_classes(
    pipeline: IwinDiTPipeline,
    labels: Sequence[int],
    num_images: int,
    seed: int,
    batch_size: int,
    **options: Any,
) -> Iterator[Sample]:
    """Draws ``num_images`` images of each class, in order, with a progress bar.

    Args:
        seed: with the class and the number of the image, the seed of its noise.
        batch_size: images of one forward pass; the images do not depend on it.
        options: arguments of the pipeline's call, such as ``guidance_scale``.
    """
    wanted = list(itertools.product(labels, range(num_images)))
    with progress(total=len(wanted), unit="image", desc="sample") as bar:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            generators = [generator(seed, "image", label, number) for label, number in batch]
            images = pipeline([label for label, _ in batch], generator=generators, **options).images
            for (label, number), image in zip(batch, images, strict=True):
                yield Sample(label, number, image)
            bar.update(len(batch))


def draw_grid(samples: Sequence[Sample], names: dict[int, str], columns: int = 10) -> Image.Image:
    """The images of a class in rows with its name at the left; small ones are enlarged without smoothing."""
    rows = [
        (label, images[start : start + columns])
        for label, group in itertools.groupby(samples, key=lambda sample: sample.label)
        for images in [[sample.image for sample in group]]
        for start in range(0, len(images), columns)
    ]
    width, height = samples[0].image.size
    factor = max(1, -(-SMALLEST_SIDE // min(width, height)))
    width, height, gap = width * factor, height * factor, 2
    font = ImageFont.load_default(size=14)
    titles = [_row_title(label, names.get(label)) for label, _ in rows]
    margin = max(int(font.getlength(title)) for title in titles) + 16
    across = max(len(images) for _, images in rows)
    grid = Image.new("RGB", (margin + across * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (title, (_, images)) in enumerate(zip(titles, rows, strict=True)):
        top = row * (height + gap)
        draw.text((8, top + height // 2), title, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * (width + gap), top))
    return grid


def write_grid(samples: Sequence[Sample], path: Path, recipe: dict[str, Any], names: dict[int, str]) -> None:
    """The grid, and the recipe as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(samples, names).save(path)
    files.replace(path.with_suffix(".json"), files.to_json(recipe))


def write_samples(samples: Sequence[Sample], folder: Path, recipe: dict[str, Any]) -> None:
    """A PNG per image, named by class and number, and ``recipe.json``; each file is complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        path = folder / f"{sample.label:04d}-{sample.number:05d}.png"
        temporary = path.with_name(f".tmp-{path.name}")
        sample.image.save(temporary, format="PNG")
        os.replace(temporary, path)
    files.replace(folder / "recipe.json", files.to_json(recipe))


def _row_title(label: int | str, name: str | None, limit: int = 28) -> str:
    title = str(label) if name in (None, str(label)) else f"{label}  {name}"
    return title if len(title) <= limit else title[: limit - 1] + "…"
