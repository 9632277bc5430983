"""Images and clips of classes, each from a seed of its own: number k of a class is the same whatever the
batch size.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image, ImageDraw, ImageFont

from iwin_dit.data.video import write_gif, write_mp4
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.lettering import Font, font_for
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import generator

T = TypeVar("T")
L = TypeVar("L")

SMALLEST_SIDE = 64  # of an image in a grid, in pixels
FPS = 8.0  # frames per second of a clip
MAX_STRIP = 10  # frames of a clip that a film strip shows
# Of a recipe: what changes which images there are, and where the weights lay, whose hashes are in it, too.
NOT_COMPARED = ("classes", "class_names", "num_images", "checkpoint", "guide")


class Sample(NamedTuple):
    """Image or clip ``number`` of a class, or of a named row."""

    label: int | str
    number: int
    frames: list[Image.Image]  # one of an image

    @property
    def image(self) -> Image.Image:
        """The first frame."""
        return self.frames[0]


def sample_classes(
    pipeline: ClassConditionalPipeline,
    labels: Sequence[int],
    num_images: int,
    seed: int,
    batch_size: int,
    drawn: Container[tuple[int, int]] = frozenset(),
    **options: Any,
) -> Iterator[Sample]:
    """Draws ``num_images`` images, or clips, of each class, in order, with a progress bar.

    Args:
        seed: with the class and the number of the image, the seed of its noise.
        batch_size: images of one forward pass; the images do not depend on it. Where memory has no room for
            so many, it is halved.
        drawn: classes and numbers of images to leave out.
        options: arguments of the pipeline's call, such as ``guidance_scale``.
    """
    wanted = [pair for pair in itertools.product(labels, range(num_images)) if pair not in drawn]

    def draw(batch: list[tuple[int, int]], generators: list[torch.Generator]) -> Any:
        return pipeline([label for label, _ in batch], generator=generators, return_dict=False, **options)[0]

    with progress(total=len(wanted), unit="image", desc="sample") as bar:
        while wanted:
            batch, wanted = wanted[:batch_size], wanted[batch_size:]
            generators = [generator(seed, "image", label, number) for label, number in batch]
            parts = draw_in_parts(draw, batch, generators)
            batch_size = max(map(len, parts))
            for (label, number), image in zip(batch, itertools.chain(*parts), strict=True):
                yield Sample(label, number, image if isinstance(image, list) else [image])
            bar.update(len(batch))


def draw_in_parts(
    draw: Callable[[list[L], list[torch.Generator]], T],
    labels: list[L],
    generators: list[torch.Generator],
) -> list[T]:
    """``[draw(labels, generators)]``; or, where this runs out of memory, of the first and of the second half.

    Halves that do not fit either are halved again. The generators begin each time where they were, so that
    the images are the same but for the rounding that depends on the batch.

    Raises:
        Exception: where not even one fits, as it was raised.
    """
    states = [generator.get_state() for generator in generators]
    try:
        return [draw(labels, generators)]
    except Exception as error:
        if len(labels) == 1 or not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)  # after the error, which held what was drawn so far
    for own, state in zip(generators, states, strict=True):
        own.set_state(state)
    half = len(labels) // 2
    return [
        *draw_in_parts(draw, labels[:half], generators[:half]),
        *draw_in_parts(draw, labels[half:], generators[half:]),
    ]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the computer, had no memory left: fewer images may fit."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def draw_grid(samples: Sequence[Sample], names: dict[int, str], columns: int = 10) -> Image.Image:
    """The images of a class in rows with its name at the left; small ones are enlarged without smoothing.

    A clip has a row of its own, its frames from left to right: all, or ten from the first to the last.
    """
    rows = [
        (label, images[start : start + columns])
        for label, group in itertools.groupby(samples, key=lambda sample: sample.label)
        for images in _lines(list(group))
        for start in range(0, len(images), columns)
    ]
    width, height = samples[0].image.size
    factor = max(1, -(-SMALLEST_SIDE // min(width, height)))
    width, height, gap = width * factor, height * factor, 2
    titles = [_row_title(label, names.get(label)) for label, _ in rows]
    margin = max(int(font.getlength(title)) for title, font in titles) + 16
    across = max(len(images) for _, images in rows)
    grid = Image.new("RGB", (margin + across * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for row, ((title, font), (_, images)) in enumerate(zip(titles, rows, strict=True)):
        top = row * (height + gap)
        draw.text((8, top + height // 2), title, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * (width + gap), top))
    return grid


def _lines(samples: list[Sample]) -> list[list[Image.Image]]:
    """One of all images, or one of each clip."""
    count = len(samples[0].frames)
    if count == 1:
        return [[sample.image for sample in samples]]
    columns = min(count, MAX_STRIP)
    shown = [round(i * (count - 1) / (columns - 1)) for i in range(columns)]
    return [[sample.frames[i] for i in shown] for sample in samples]


def draw_animation(samples: Sequence[Sample], names: dict[int, str]) -> list[Image.Image]:
    """A grid for each frame of clips of one length."""
    still = [[Sample(s.label, s.number, [frame]) for frame in s.frames] for s in samples]
    return [draw_grid(frames, names) for frames in zip(*still, strict=True)]


def write_grid(
    samples: Sequence[Sample], path: Path, recipe: dict[str, Any], names: dict[int, str], fps: float = FPS
) -> list[Path]:
    """The grid, and the recipe as JSON beside it; of clips the film strips, and the grid as GIF and MP4.

    Returns:
        the pictures written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(".png")]
    draw_grid(samples, names).save(written[0])
    if len(samples[0].frames) > 1:
        frames = draw_animation(samples, names)
        written += [path.with_suffix(".gif"), path.with_suffix(".mp4")]
        write_gif(frames, written[1], fps)
        write_mp4(frames, written[2], fps)
    files.replace(path.with_suffix(".json"), files.to_json(recipe))
    return written


def check_grid(path: Path) -> None:
    """Raises ConfigError where a file of somebody else lies where the grid's recipe belongs."""
    recipe = path.with_suffix(".json")
    try:
        if recipe.exists() and "checkpoint" not in files.read_json(recipe, limits.JSON_BYTES):
            raise ValueError("it names no checkpoint")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the recipe of --out {path} would be written over {recipe}, which is none of sample.py "
            f"({error}); take another name"
        ) from None


def open_folder(folder: Path, recipe: dict[str, Any]) -> set[tuple[int, int]]:
    """A folder for images of this recipe, which is written into it as ``recipe.json``.

    Returns:
        class and number of the images or clips that are there already, of an earlier call that may have been
        stopped.

    Raises:
        ConfigError: where it holds images of another recipe; more classes and images are the same one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = (re.fullmatch(r"(\d{4,})-(\d{5,})\.png", path.name) for path in folder.iterdir())
    drawn = {(int(name[1]), int(name[2])) for name in names if name}
    path = folder / "recipe.json"
    if drawn:  # a recipe alone is that of a call that was refused
        try:
            before = files.read_object(path, limits.JSON_BYTES)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} is not the recipe of the images beside it: {error}; remove the folder, or take "
                "another"
            ) from error
        now = json.loads(files.to_json(recipe))
        changed = [key for key in now if key not in NOT_COMPARED and before.get(key) != now[key]]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"--out {folder} holds images of another recipe ({key}: {before.get(key)} -> {now[key]}); "
                "remove it, or take another folder"
            )
    files.replace(path, files.to_json(recipe))
    return drawn


def write_samples(samples: Iterable[Sample], folder: Path, fps: float = FPS) -> int:
    """A PNG per image, named by class and number, as it comes; each is complete or absent.

    A clip is a GIF, an MP4 and, when these are complete, its film strip as PNG.

    Returns:
        how many images or clips.
    """
    count = 0
    for sample in samples:
        path = folder / f"{sample.label:04d}-{sample.number:05d}.png"
        image = sample.image
        if len(sample.frames) > 1:
            write_gif(sample.frames, path.with_suffix(".gif"), fps)
            write_mp4(sample.frames, path.with_suffix(".mp4"), fps)
            image = draw_grid([sample], {})
        data = io.BytesIO()
        image.save(data, format="PNG")
        files.replace(path, data.getvalue())
        count += 1
    return count


def _row_title(label: int | str, name: str | None, limit: int = 28, size: int = 14) -> tuple[str, Font]:
    """The class and its name in a font that has its letters; without such a font, the class alone."""
    title = str(label) if name in (None, str(label)) else f"{label}  {name}"
    title = title if len(title) <= limit else f"{title[: limit - 3]}..."
    font = font_for(title, size)
    if font is None:
        warnings.warn(f"no font here has the letters of {title!r}: the picture shows less", stacklevel=2)
        title = "".join(letter for letter in str(label) if letter.isascii()) or "?"
    return title, font or ImageFont.load_default(size)
