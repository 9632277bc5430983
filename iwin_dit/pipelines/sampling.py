"""Images of classes, each from a seed of its own: image k of a class is the same whatever the batch size."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import generator

SMALLEST_SIDE = 64  # of an image in a grid, in pixels
AMOUNTS = ("classes", "num_images")  # of a recipe: what they change is which images there are
MAX_RECIPE_BYTES = 1 << 20


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
    drawn: Container[tuple[int, int]] = frozenset(),
    **options: Any,
) -> Iterator[Sample]:
    """Draws ``num_images`` images of each class, in order, with a progress bar.

    Args:
        seed: with the class and the number of the image, the seed of its noise.
        batch_size: images of one forward pass; the images do not depend on it.
        drawn: classes and numbers of images to leave out.
        options: arguments of the pipeline's call, such as ``guidance_scale``.
    """
    wanted = [pair for pair in itertools.product(labels, range(num_images)) if pair not in drawn]
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


def write_grid(samples: Sequence[Sample], path: Path, recipe: dict[str, Any], names: dict[int, str]) -> int:
    """The grid, and the recipe as JSON beside it. Returns how many images there are in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(samples, names).save(path)
    files.replace(path.with_suffix(".json"), files.to_json(recipe))
    return len(samples)


def open_folder(folder: Path, recipe: dict[str, Any]) -> set[tuple[int, int]]:
    """A folder for images of this recipe, which is written into it as ``recipe.json``.

    Returns:
        class and number of the images that are there already, of an earlier call that may have been stopped.

    Raises:
        ConfigError: where it holds images of another recipe; more classes and images are the same one.
    """
    path = folder / "recipe.json"
    now = json.loads(files.to_json(recipe))
    if path.exists():
        before = files.read_json(path, MAX_RECIPE_BYTES)
        changed = [key for key in now if key not in AMOUNTS and before.get(key) != now[key]]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"--out {folder} holds images of another recipe ({key}: {before.get(key)} -> {now[key]}); "
                "remove it, or take another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(path, files.to_json(recipe))
    names = (re.fullmatch(r"(\d{4,})-(\d{5,})\.png", name.name) for name in folder.iterdir())
    return {(int(name[1]), int(name[2])) for name in names if name}


def write_samples(samples: Iterable[Sample], folder: Path) -> int:
    """A PNG per image, named by class and number, as it comes; each is complete or absent.

    Returns:
        how many.
    """
    count = 0
    for sample in samples:
        path = folder / f"{sample.label:04d}-{sample.number:05d}.png"
        temporary = path.with_name(f".tmp-{path.name}")
        sample.image.save(temporary, format="PNG")
        os.replace(temporary, path)
        count += 1
    return count


def _row_title(label: int | str, name: str | None, limit: int = 28) -> str:
    title = str(label) if name in (None, str(label)) else f"{label}  {name}"
    return title if len(title) <= limit else title[: limit - 1] + "…"
