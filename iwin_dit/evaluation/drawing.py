"""Images that a pipeline draws when they are asked for, as a set that metrics compare."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.sampling import draw_in_parts
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
