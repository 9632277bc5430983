"""What a model cannot see: places that it cannot tell apart, and tokens that never meet.

Attention treats its keys as a set. Where they stand enters by position embeddings, by the zeros beyond the
border that a convolution reads, by learned biases of relative positions, or by neighbourhoods. A model
without any of these answers shuffled tokens with its shuffled answer: it draws patches in no order.

Imports no torch, so that a config can use it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from iwin_dit.layers.specs import Axis, MixerSpec, WindowWord, per_axis

AXES = {2: ("rows", "columns"), 3: ("frames", "rows", "columns")}  # by the rank of the grid


class BlindSpots(NamedTuple):
    """Names of the axes whose tokens never meet, and of those whose order the model cannot tell."""

    apart: list[str]
    unordered: list[str]

    def __bool__(self) -> bool:
        return bool(self.apart or self.unordered)

    def __str__(self) -> str:
        parts = [(self.apart, "its {} never meet"), (self.unordered, "it cannot tell the order of {}")]
        return ", and ".join(words.format(" and ".join(axes)) for axes, words in parts if axes)


def blind_spots(mixer: MixerSpec, grid: tuple[int, ...], positions: str, depth: int = 2) -> BlindSpots:
    """What a model of blocks of this mixer cannot see on this grid; false for one that sees all.

    It is read off the structure, axis by axis: a grid is connected exactly where each of its axes is, since
    every mixer has paths along one axis alone.

    Args:
        mixer: of every block.
        grid: tokens per axis.
        positions: the ``position_embedding`` of the model.
        depth: number of blocks; a single one of Swin has no shift.
    """
    window = mixer.window(grid) if mixer.reads("window_size") else grid
    kernel = mixer.kernel_sides(grid) if mixer.has_convolution(grid) else (1,) * len(grid)
    found = BlindSpots([], [])
    for name, side, m, k in zip(AXES[len(grid)], grid, window, kernel, strict=True):
        axis = Axis(side, m, k, depth)
        if axis.side == 1:
            continue
        embedded = "sincos" in positions or "rope" in positions or (positions == "time" and name == "frames")
        found.apart.extend([] if mixer.kind.meets(axis) else [name])
        found.unordered.extend([] if mixer.kind.tells_order(axis) or embedded else [name])
    return found


def resolve(mixer: MixerSpec, grid: tuple[int, ...], positions: str) -> MixerSpec:
    """The mixer with what ``auto`` means in a model whose blocks are all alike: it never makes it blind.

    The convolution is left out where one window covers the grid and positions come from elsewhere; without a
    convolution an automatic window is the whole side.
    """
    if not mixer.reads("convolution"):
        return mixer
    without = _without_convolution(mixer, "all")
    if mixer.convolution is False:
        return without
    covers = mixer.window(grid) == tuple(grid)
    if mixer.convolution == "auto" and covers and not blind_spots(without, grid, positions):
        return without
    return replace(mixer, convolution=True)


def of_earlier_version(mixer: MixerSpec, grid: tuple[int, ...]) -> MixerSpec:
    """The mixer with what ``auto`` meant in saved models and runs of version 0.1.

    A window that covered the grid left out the convolution, whether or not the model had positions, and
    automatic windows did not depend on it.
    """
    if not mixer.reads("convolution"):
        return mixer
    if mixer.has_convolution(grid):
        return replace(mixer, convolution=True)
    return _without_convolution(mixer, "divisor")


def _without_convolution(mixer: MixerSpec, window: WindowWord) -> MixerSpec:
    """Without the convolution, and with automatic windows of this kind."""
    several, sizes = isinstance(mixer.window_size, list), per_axis(mixer.window_size)
    sizes = [window if size == "auto" else size for size in sizes]
    return replace(mixer, convolution=False, window_size=sizes if several else sizes[0])
