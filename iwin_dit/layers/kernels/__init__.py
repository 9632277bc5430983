"""Triton kernels of the Iwin module, and the choice between them and PyTorch's own operations.

This file needs neither triton nor a GPU; :func:`interleaved_attention` and :func:`depthwise_convolution` do.
They are differentiable once, custom operators of PyTorch (no graph breaks under ``torch.compile``), and take
what the caller has cast: autocast does not reach into them.

Legend: B batch, C channels, K heads, d = C / K.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Selection = Literal["auto", "triton", "torch"]

INSTALLED = find_spec("triton") is not None
MAX_HEAD_WIDTH = 128
MAX_TAPS = 27  # of a convolution: the backward pass holds a sum for each in registers
HALF = (torch.bfloat16, torch.float16)
_selection: Selection = "auto"


def select(name: Selection) -> None:
    """Chooses for the whole process.

    Args:
        name: ``auto``, the kernels on NVIDIA's cards from Ampere on, in half precision, which is where they
            are fast; ``triton``, always (the CPU runs them in Triton's interpreter, for tests); ``torch``,
            never.

    Raises:
        ValueError: where the name is another, or triton is not installed.
    """
    global _selection
    if name not in get_args(Selection):
        raise ValueError(f"unknown kernels {name!r}, expected one of {', '.join(get_args(Selection))}")
    if name == "triton" and not INSTALLED:
        raise ValueError("triton is not installed: pip install triton, or select 'auto'")
    _selection = name


def use_attention(x: Tensor, head_width: int) -> bool:
    """Whether the kernel of attention serves heads of this width, of a projection of ``x``.

    Under autocast a projection has its dtype, not that of ``x``.
    """
    kind, dtype = x.device.type, x.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return head_width <= MAX_HEAD_WIDTH and _serves(x.device, dtype, head_width % 8 == 0)


def use_convolution(x: Tensor, taps: int) -> bool:
    """Whether the kernel of the convolution serves tokens like ``x``.

    Args:
        taps: of its kernel, 9 of 3 x 3.
    """
    return _serves(x.device, x.dtype, taps <= MAX_TAPS)


def _serves(device: torch.device, dtype: torch.dtype, is_fast: bool) -> bool:
    if _selection == "triton":
        return dtype in (*HALF, torch.float32)
    # in float32 they do without TF32; tiles fit the memory of a multiprocessor from Ampere on
    if not is_fast or _selection != "auto" or not INSTALLED or device.type != "cuda" or dtype not in HALF:
        return False
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= 8


def interleaved_attention(qkv: Tensor, window: tuple[int, ...], heads: int) -> Tensor:
    """Multi-head attention inside interleaved windows, read and written in the grid's order.

    Equals :func:`~iwin_dit.layers.windows.partition`, scaled dot-product attention (scale ``d**-0.5``) and
    :func:`~iwin_dit.layers.windows.reverse`. Where the window does not divide a side, tokens beyond the grid
    do not exist: no query sees them.

    Args:
        qkv: ``(B, *grid, 3 C)``, q, k and v each ``(heads, d)``; float32, bfloat16 or float16; rank 2 or 3.
        window: its sides, one per axis of the grid.
        heads: K.

    Returns:
        ``(B, *grid, C)`` in qkv's dtype; sums are float32.

    Raises:
        RuntimeError: on a CPU without Triton's interpreter.
    """
    from iwin_dit.layers.kernels.attention import attend

    return attend(qkv, window, heads)[0]


def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
    attended: Tensor | None = None,
    attended_gate: Tensor | None = None,
) -> Tensor:
    """``residual + gate * (convolution(x) + bias)``, each channel convolved by itself, zero padding.

    With a second branch, ``+ attended_gate * attended``: all that an Iwin block adds to its residual, in one
    pass over the tokens.

    Args:
        x: ``(B, *grid, C)``, float32, bfloat16 or float16; rank 2 or 3.
        weight: ``(C, 1, *kernel)``, of odd sides.
        bias: ``(C,)``.
        residual: as x, usually float32.
        gate: broadcastable to ``(B, 1, .., 1, C)``.
        attended, attended_gate: as x and gate.

    Returns:
        as residual; sums are float32.

    Raises:
        ValueError: where a side of the kernel is even.
        RuntimeError: on a CPU without Triton's interpreter.
    """
    from iwin_dit.layers.kernels.convolution import convolve

    sides = tuple(weight.shape[2:])
    if any(side % 2 == 0 for side in sides):
        raise ValueError(f"the kernel is {sides}, its sides must be odd")
    taps = weight.flatten(1).T.contiguous()  # (taps, C): neighbouring channels are read at once

    def rows(gate: Tensor) -> Tensor:  # (B, C)
        return gate.expand(len(x), *(1,) * (gate.ndim - 2), x.shape[-1]).reshape(len(x), x.shape[-1])

    other = None if attended_gate is None else rows(attended_gate)
    return convolve(x, taps, bias, residual, rows(gate), attended, other, sides)
