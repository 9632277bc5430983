"""Images drawn with their masks: circles, squares, triangles and rings on textured, noisy backgrounds.

Image and mask are a function of (seed, split, index) alone.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iwin_dit.runtime.seeds import derive_seed, generator

CLASSES = ("background", "circle", "square", "triangle", "ring")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HOLE = 0.55  # of a ring's radius
MAX_HIDDEN = 0.5  # of a shape's pixels
RADIUS = (0.18, 0.32)  # of a shape over the image's side
CONTRAST = 0.4  # least distance of a shape's colour from the background's two, in a cube of side 1
TILT = 0.2  # radians, either way


class Shapes:
    """Item i is a float image ``(3, side, side)``, normalised, and its mask ``(side, side)`` of classes.

    Args:
        seed, split: of all images; another split has other images.
        count: of images.
    """

    class_names = CLASSES
    mean, std = MEAN, STD

    def __init__(self, seed: int, split: str, count: int, side: int):
        self.seed, self.split, self.count, self.side = seed, split, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, mask = draw((self.seed, self.split, index), self.side)
        image = (torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)
        return image.permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


def draw(key: tuple[int | str, ...], side: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """One image: float32 ``(side, side, 3)`` in [0, 1], and its mask, int64 ``(side, side)``.

    Args:
        key: what the image is a function of.
        noise: standard deviation of what is added to every pixel.
    """
    rng = np.random.default_rng(derive_seed("shapes", *key))
    tones = rng.uniform(0, 1, (2, 3))
    image, mask, shape_of = background(key, side, tones, rng), np.zeros((side, side), np.int64), {}
    owner = np.zeros((side, side), np.int64)  # the number of the shape that is seen at a pixel
    for number in range(1, rng.integers(2, 5)):
        kind = int(rng.integers(1, len(CLASSES)))
        radius, angle = side * rng.uniform(*RADIUS), rng.uniform(-TILT, TILT)
        centre, colour = side * rng.uniform(0.1, 0.9, 2), another_colour(tones, rng)
        covered = inside(CLASSES[kind], side, centre, radius, angle)
        left = {n: np.count_nonzero((owner == n) & ~covered) for n in shape_of}
        if any(left[n] < (1 - MAX_HIDDEN) * size for n, size in shape_of.items()):
            continue  # it would hide too much of another one
        image[covered], mask[covered], owner[covered] = colour, kind, number
        shape_of[number] = np.count_nonzero(covered)
    image += rng.normal(0, noise, image.shape)
    return image.clip(0, 1).astype(np.float32), mask


def another_colour(tones: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that is none of these ``(n, 3)``."""
    while True:
        colour = rng.uniform(0, 1, 3)
        if np.linalg.norm(tones - colour, axis=1).min() > CONTRAST:
            return colour


def background(
    key: tuple[int | str, ...], side: int, tones: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Clouds of two tones with stripes over them, ``(side, side, 3)``."""
    clouds = F.interpolate(
        torch.rand(1, 1, 5, 5, generator=generator("clouds", *key)), size=(side, side), mode="bicubic"
    )[0, 0, :, :, None].numpy()
    low, high = tones
    y, x = pixel_grid(side)
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.05, 0.4) * side
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)[..., None]
    return low + (high - low) * clouds + rng.uniform(0, 0.12) * stripes


def inside(kind: str, side: int, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """The pixels, bool ``(side, side)``, whose centre is in a shape; ``radius`` is of its outer circle."""
    y, x = pixel_grid(side)
    y, x = y - centre[0], x - centre[1]
    distance = np.hypot(x, y)
    if kind == "circle":
        return distance <= radius
    if kind == "ring":
        return (distance <= radius) & (distance >= HOLE * radius)
    corners = {"triangle": 3, "square": 4}[kind]  # a regular polygon is an intersection of half planes
    normals = angle + np.pi / 2 + 2 * np.pi * np.arange(corners) / corners  # one side is at the bottom
    reach = np.max(x[..., None] * np.cos(normals) + y[..., None] * np.sin(normals), -1)
    return reach <= radius * np.cos(np.pi / corners)


def pixel_grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x of the pixels' centres."""
    return tuple(np.mgrid[:side, :side] + 0.5)
