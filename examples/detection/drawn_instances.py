"""Circles, squares and triangles on textured backgrounds, with a mask each: images without a download."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from iwin_dit.runtime.seeds import generator

CLASSES = ("circle", "square", "triangle")
MOST_SHAPES = 4
HELD_OUT = 1_000_000  # index of the first image that no training sees


def draw(seed: int, index: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image ``index``: pixels ``(3, H, W)`` in [0, 1], masks ``(N, H, W)`` and labels ``(N,)`` from 1 up.

    Shapes are turned by up to 30 degrees. Later ones cover earlier ones, whose masks are what is still
    visible, at least 70 %.
    """
    random = generator("instances", seed, index)
    image = texture(random, size)
    masks, areas, labels = [], [], []
    for _ in range(int(torch.randint(1, MOST_SHAPES + 1, (1,), generator=random))):
        label = int(torch.randint(len(CLASSES), (1,), generator=random))
        radius, row, column, angle = torch.rand(4, generator=random).tolist()
        radius = size * (0.1 + 0.14 * radius)
        row, column = (radius + (size - 1 - 2 * radius) * place for place in (row, column))
        shape = shape_mask(CLASSES[label], size, row, column, radius, (angle - 0.5) * math.pi / 3)
        rests = [mask & ~shape for mask in masks]
        if any(rest.sum() < 0.7 * area for rest, area in zip(rests, areas, strict=True)):
            continue
        behind = image[:, shape].mean(1)
        colour = torch.rand(3, generator=random)
        while (colour - behind).abs().max() < 0.35:
            colour = torch.rand(3, generator=random)
        image[:, shape] = colour[:, None] + 0.3 * (image[:, shape] - behind[:, None])
        masks, areas, labels = [*rests, shape], [*areas, int(shape.sum())], [*labels, label + 1]
    return image.clamp(0, 1), torch.stack(masks), torch.tensor(labels)


def texture(random: torch.Generator, size: int) -> Tensor:
    """A colour with clouds and stripes: ``(3, size, size)``."""
    colour = 0.25 + 0.5 * torch.rand(3, 1, 1, generator=random)
    clouds = F.interpolate(
        torch.randn(1, 3, 8, 8, generator=random), (size, size), mode="bilinear", align_corners=False
    )[0]
    angle, period, strength = torch.rand(3, generator=random).tolist()
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = rows * math.cos(2 * math.pi * angle) + columns * math.sin(2 * math.pi * angle)
    stripes = torch.sin(2 * math.pi * along / (4 + 12 * period))
    return colour + 0.07 * clouds + 0.1 * strength * stripes


def shape_mask(kind: str, size: int, row: float, column: float, radius: float, angle: float) -> Tensor:
    """True inside a shape, whose corners lie on a circle of ``radius``: ``(size, size)``."""
    rows, columns = torch.meshgrid(torch.arange(size) - row, torch.arange(size) - column, indexing="ij")
    if kind == "circle":
        return rows**2 + columns**2 <= radius**2
    sides = {"square": 4, "triangle": 3}[kind]
    angles = [angle + 2 * math.pi * i / sides for i in range(sides)]
    depth = torch.stack([rows * math.cos(a) + columns * math.sin(a) for a in angles]).amax(0)
    return depth <= radius * math.cos(math.pi / sides)


def boxes_of(masks: Tensor) -> Tensor:
    """Corners ``(x0, y0, x1, y1)`` of masks ``(N, H, W)``, x1 and y1 behind the last pixel: ``(N, 4)``."""
    boxes = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return torch.tensor(boxes, dtype=torch.float32)


class DrawnInstances(torch.utils.data.Dataset):
    """Images ``first`` to ``first + count - 1`` of a seed, each a pure function of seed and index.

    An item is ``(image, target)`` as torchvision's detectors take them: pixels ``(3, H, W)`` in [0, 1] and
    boxes ``(N, 4)``, labels ``(N,)``, masks ``(N, H, W)`` and image_id ``(1,)``.
    """

    class_names = CLASSES
    category_ids = {i + 1: i + 1 for i in range(len(CLASSES))}  # by label

    def __init__(self, seed: int, first: int, count: int, size: int):
        self.seed, self.first, self.count, self.size = seed, first, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        image, masks, labels = draw(self.seed, self.first + i, self.size)
        target = dict(boxes=boxes_of(masks), labels=labels, masks=masks.to(torch.uint8))
        return image, target | dict(image_id=torch.tensor([i]))

    def truth(self) -> COCO:
        """What is in the images, as pycocotools evaluates it."""
        images, annotations = [], []
        for i in range(self.count):
            images.append(dict(id=i, width=self.size, height=self.size))
            for label, mask in zip(*[self[i][1][key] for key in ("labels", "masks")], strict=True):
                annotations.append(annotation(len(annotations) + 1, i, int(label), mask))
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
        return index_truth(dict(info={}, images=images, annotations=annotations, categories=categories))


def annotation(number: int, image_id: int, category_id: int, mask: Tensor) -> dict[str, Any]:
    """An object as COCO describes it; ``number`` is from 1 up, since pycocotools takes 0 for none."""
    encoded = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    box, area = rle.toBbox(encoded).tolist(), float(rle.area(encoded))
    kind = dict(id=number, image_id=image_id, category_id=category_id, iscrowd=0)
    return kind | dict(segmentation=encoded, bbox=box, area=area)


def index_truth(data: dict[str, Any]) -> COCO:
    """A data set in COCO's layout that is no file."""
    truth = COCO()
    truth.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
