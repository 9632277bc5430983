"""Typed specs of the parts of a network, and the table of model sizes.

Imports no torch, so that a config can use it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

# depth, width, heads. XL is DiT's (Peebles & Xie 2023, table 1), 1p0B and 1p6B are LightningDiT's.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}


def shape_of(size: str) -> tuple[int, int, int, int]:
    """Depth, width, heads and patch size of a name such as ``XL/1``.

    Raises:
        ValueError: with the names that there are.
    """
    name, _, patch = size.partition("/")
    if name not in SIZES or not re.fullmatch("[1-9][0-9]{0,3}", patch):
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"; did you mean {near[0]}/{patch or 1}?" if near else ""
        raise ValueError(
            f"unknown size {size!r}, expected one of {', '.join(SIZES)}, a slash and the patch size{hint}"
        )
    return (*SIZES[name], int(patch))


WindowWord = Literal["auto", "all", "divisor"]
NormName = Literal["rms_norm", "layer_norm"]
MlpName = Literal["swiglu", "gelu"]


def middle_of(depth: int, dense_blocks: Sequence[int] | None, base_block: int | None) -> range:
    """The numbers of the blocks between so many dense ones at both ends, which training may thin out.

    Args:
        depth: blocks.
        dense_blocks: at the beginning and at the end; None leaves nothing between.
        base_block: a second head reads the tokens after so many blocks.

    Raises:
        ValueError: where that does not fit.
    """
    if base_block is not None and not 0 < base_block < depth:
        raise ValueError(f"base_block is {base_block}, expected a number of blocks from 1 to {depth - 1}")
    if dense_blocks is None:
        return range(depth, depth)
    first, last = dense_blocks
    middle = range(first, depth - last)
    if min(first, last) < 1 or not middle:
        raise ValueError(
            f"dense_blocks is {[first, last]}, expected two numbers from 1 that leave some of {depth} blocks"
        )
    if base_block is not None and first < base_block <= middle.stop:
        raise ValueError(
            f"base_block {base_block} stands between the dense_blocks {[first, last]}, where tokens may be "
            f"dropped; take at most {first} or at least {middle.stop + 1}"
        )
    return middle


class Axis(NamedTuple):
    """Tokens along an axis: of the grid, of a window, and of the convolution; and the number of blocks."""

    side: int
    window: int
    kernel: int
    depth: int


@dataclass(frozen=True)
class MixerKind:
    """What a config knows of a token mixer. The defaults are those of attention over all tokens.

    Args:
        implementation: its class, a :class:`~iwin_dit.layers.token_mixer.TokenMixer`: module, colon and name.
        fields: of :class:`MixerSpec` that it reads.
        meets: whether all tokens along an axis meet, in so many blocks or more.
        tells_order: whether it tells the order of the tokens along an axis, without position embeddings.
        least_window: of an automatic window; 2 where a window of 1 would join nothing.
        odd_window: a window has a middle: it is an odd number of at least 3, or the whole side.
        ranks: of the grids that it takes, 2 of images and 3 of clips.
        normalises_queries: whether it does so anyhow, so that ``qk_norm`` has no meaning.
        takes_projections: whether the block may project queries, keys and values for it, which a value
            residual needs.
    """

    implementation: str
    fields: tuple[str, ...] = ()
    meets: Callable[[Axis], bool] = lambda axis: True
    tells_order: Callable[[Axis], bool] = lambda axis: False
    least_window: int = 2
    odd_window: bool = False
    ranks: tuple[int, ...] = (2, 3)
    normalises_queries: bool = False
    takes_projections: bool = False


SWIN = MixerKind(
    "iwin_dit.layers.swin:SwinMixer",
    fields=("window_size",),
    meets=lambda axis: axis.window == axis.side or (axis.window > 1 and axis.depth > 1),  # shifted in the 2nd
    tells_order=lambda axis: axis.window > 1,
    takes_projections=True,
)
MIXERS: dict[str, MixerKind] = {
    "iwin": MixerKind(
        "iwin_dit.layers.iwin:IwinMixer",
        fields=("window_size", "kernel_size", "convolution", "mask_padding"),
        meets=lambda axis: axis.window == axis.side or axis.kernel > 1,
        tells_order=lambda axis: axis.kernel > 1,
        least_window=1,
        takes_projections=True,
    ),
    "global": MixerKind("iwin_dit.layers.global_attention:GlobalMixer", takes_projections=True),
    "swin": SWIN,
    "swin_v2": replace(
        SWIN,
        implementation="iwin_dit.layers.swin:SwinV2Mixer",
        normalises_queries=True,
        takes_projections=False,
    ),
    "neighborhood": MixerKind(
        "iwin_dit.layers.neighborhood:NeighborhoodMixer",
        fields=("window_size",),
        meets=lambda axis: axis.window > 1,
        tells_order=lambda axis: axis.window < axis.side,
        odd_window=True,
        takes_projections=True,
    ),
    "factorised": MixerKind("iwin_dit.layers.global_attention:FactorisedMixer", ranks=(3,)),
}


@dataclass(frozen=True)
class MixerSpec:
    """How the tokens of a block exchange information.

    Args:
        name: of :data:`MIXERS`: ``iwin`` is interleaved-window attention beside a depthwise convolution
            (arXiv 2507.18405); ``global`` is attention over all tokens; ``swin`` and ``swin_v2`` are windows
            that every second block shifts (Liu et al. 2021, 2022); ``neighborhood`` is the window around each
            token (Hassani et al. 2023); ``factorised``, of clips, is attention over space, then over time.
        window_size: tokens per axis of one window: a number, or ``auto``, the smallest divisor M of the side
            with ``kernel_size * M >= side``, or ``all``, the whole side. One for all axes, or one per axis,
            such as ``[all, 8, 8]`` for clips, whose first axis is time. A neighbourhood is odd, the largest
            odd number up to this but at least 3, or the whole of a shorter side. In a generator ``auto``
            without a convolution is ``all``; ``divisor`` is that smallest divisor with or without one, as
            generators of version 0.1 had it.
        kernel_size: side of the depthwise convolution, odd: one for all axes, or one per axis; clips whose
            frames are convolved each by itself have ``[1, 3, 3]``. Only ``iwin`` uses it.
        convolution: whether there is one; ``auto`` leaves it out where one window covers the whole grid,
            since attention connects everything there. A generator keeps it even so where nothing else tells
            it positions (:func:`iwin_dit.layers.blindness.resolve`). Only ``iwin`` uses it.
        mask_padding: hide the padded keys where the window does not divide the grid. ``False`` is what the
            official weights were trained with. Only ``iwin`` uses it.
        convolution_on: is ``input``. Version 0.1 saved it, and knew two other values.
    """

    name: str = "iwin"
    window_size: int | list[int | WindowWord] | WindowWord = "auto"
    kernel_size: int | list[int] = 3
    convolution: bool | Literal["auto"] = "auto"
    mask_padding: bool = True
    convolution_on: InitVar[str] = "input"

    def __post_init__(self, convolution_on: str) -> None:
        for name in (
            "window_size",
            "kernel_size",
        ):  # JSON and YAML know lists only: one form, to compare equal
            if isinstance(getattr(self, name), tuple):
                object.__setattr__(self, name, list(getattr(self, name)))
        if self.name not in MIXERS:
            raise ValueError(f"mixer.name is {self.name!r}, expected one of {', '.join(MIXERS)}")
        known = ("name", *self.kind.fields)
        unused = [f.name for f in fields(self) if f.name not in known and getattr(self, f.name) != f.default]
        if unused:
            raise ValueError(
                f"the {self.name} mixer has no {' or '.join(unused)}: remove it, or take mixer.name iwin"
            )
        if convolution_on != "input":
            raise ValueError(
                f"mixer.convolution_on is {convolution_on!r}, which version 0.1 alone can do: now the "
                "convolution reads the mixer's input; remove the key"
            )
        for side in per_axis(self.window_size):
            if side not in get_args(WindowWord) and not (isinstance(side, int) and side >= 1):
                raise ValueError(
                    f"mixer.window_size is {self.window_size!r}, expected positive integers, 'auto' or 'all'"
                )
        for side in per_axis(self.kernel_size):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"mixer.kernel_size is {self.kernel_size}, expected an odd number such as 3")

    def window(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The window on this grid, one number per axis; never larger than the grid."""
        sizes = _of_grid("window_size", self.window_size, grid)
        window = tuple(
            _smallest_connecting_divisor(side, kernel, self.kind.least_window)
            if size in ("auto", "divisor")
            else side
            if size == "all"
            else min(size, side)
            for size, kernel, side in zip(sizes, self.kernel_sides(grid), grid, strict=True)
        )
        if self.kind.odd_window:
            window = tuple(min(side, max(3, m - (m % 2 == 0))) for m, side in zip(window, grid, strict=True))
        return window

    @property
    def kind(self) -> MixerKind:
        """The mixer's row."""
        return MIXERS[self.name]

    def reads(self, field: str) -> bool:
        """Whether this field means anything to the mixer."""
        return field in self.kind.fields

    def check_rank(self, grid: tuple[int, ...]) -> None:
        """Raises ValueError where the mixer does not take grids of so many axes."""
        if len(grid) not in self.kind.ranks:
            only = "clips: set sample_frames" if 3 in self.kind.ranks else "images: leave out sample_frames"
            raise ValueError(f"the {self.name} mixer is for {only}, or take another mixer")

    def kernel_sides(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The sides of the depthwise convolution, one number per axis of the grid."""
        return tuple(_of_grid("kernel_size", self.kernel_size, grid))

    def has_convolution(self, grid: tuple[int, ...]) -> bool:
        """Whether a mixer that is made for this grid has the depthwise convolution."""
        if not self.reads("convolution"):
            return False
        return self.window(grid) != tuple(grid) if self.convolution == "auto" else self.convolution


def per_axis(value: Any, rank: int = 1) -> list[Any]:
    """One value for all axes as so many, or one per axis as it is."""
    return value if isinstance(value, list) else [value] * rank


def _of_grid(name: str, value: Any, grid: tuple[int, ...]) -> list[Any]:
    values = per_axis(value, len(grid))
    if len(values) != len(grid):
        raise ValueError(f"{name} {value} has {len(values)} axes, the grid {grid} has {len(grid)}")
    return values


def _smallest_connecting_divisor(side: int, kernel_size: int, least: int) -> int:
    """The smallest divisor M of ``side`` with K M >= side (arXiv 2507.18405, section 3.3).

    That is the most groups G = side / M that are at most K, so that few numbers are tried for any side.
    """
    groups = range(min(kernel_size, side // least), 0, -1)
    return next((side // g for g in groups if side % g == 0), side)


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block, everything but the grid it works on.

    Args:
        width: channels of a token.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden width of the MLP over ``width``; SwiGLU takes two thirds of it, for equal cost.
        mixer: the token mixer.
        norm: ``rms_norm`` with a learned weight, or ``layer_norm`` without.
        mlp: ``swiglu`` or ``gelu`` (tanh approximation).
        qk_norm: normalise queries and keys per head.
        modulation_shift: the modulation shifts and scales; without, it only scales.
        open_gates: gates are ``1 + gate``, so that branches start open; without, adaLN-Zero's ``gate``.
        post_norm: normalise and modulate what a branch returns (Swin V2), rather than what it reads.
        value_residual: mix the values of the first block into those of later ones.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    mixer: MixerSpec = MixerSpec()
    norm: NormName = "rms_norm"
    mlp: MlpName = "swiglu"
    qk_norm: bool = False
    modulation_shift: bool = True
    open_gates: bool = True
    post_norm: bool = False
    value_residual: bool = False

    def __post_init__(self) -> None:
        if self.value_residual and not self.mixer.kind.takes_projections:
            fitting = ", ".join(name for name, kind in MIXERS.items() if kind.takes_projections)
            raise ValueError(
                f"value_residual: the {self.mixer.name} mixer has none; take {fitting}, or remove it"
            )
        if self.qk_norm and self.mixer.kind.normalises_queries:
            raise ValueError(f"qk_norm: {self.mixer.name} normalises queries and keys already; remove it")
        for name, choices in (("norm", get_args(NormName)), ("mlp", get_args(MlpName))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(choices)}")
        if self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide the width {self.width}; "
                f"nearest that do: {_nearest_divisors(self.width, self.heads)}"
            )

    @property
    def mlp_hidden(self) -> int:
        hidden = int(self.width * self.mlp_ratio)
        return int(2 / 3 * hidden) if self.mlp == "swiglu" else hidden


def _nearest_divisors(number: int, target: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - target))[:3])))
