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
HALF = (torch.bfloat16, torch.float16)
_selection: Selection = "auto"


def select(name: Selection) -> None:
    """Chooses for the whole process.

    Args:
        name: ``auto``, the kernels on CUDA where they were measured faster; ``triton``, always (the CPU runs
            them in Triton's interpreter, for tests); ``torch``, never.

    Raises:
        ValueError: where the name is another, or triton is not installed.
    """
    global _selection
    if name not in get_args(Selection):
        raise ValueError(f"unknown kernels {name!r}, expected one of {', '.join(get_args(Selection))}")
    if name == "triton" and not INSTALLED:
        raise ValueError("triton is not installed: pip install triton, or select 'auto'")
    _selection = name


def use_attention(x: Tensor, window_tokens: int, head_width: int) -> bool:
    """Whether the kernel of attention serves packed queries, keys and values like ``x``.

    Args:
        x: of the dtype and on the device that :func:`interleaved_attention` would get.
        window_tokens: tokens of a window.
        head_width: d.
    """
    if _selection == "triton":
        return x.dtype in (*HALF, torch.float32) and head_width <= MAX_HEAD_WIDTH
    # measured on an H100 in bfloat16 (benchmarks/RESULTS.md); in float32 the kernel does without TF32
    fits = x.is_cuda and x.dtype in HALF and head_width % 8 == 0 and head_width <= MAX_HEAD_WIDTH
    return _selection == "auto" and INSTALLED and fits


def use_convolution(x: Tensor) -> bool:
    """Whether the kernel of the convolution serves tokens like ``x``."""
    if _selection == "triton":
        return x.dtype in (*HALF, torch.float32)
    return _selection == "auto" and INSTALLED and x.is_cuda and x.dtype in HALF


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

    return attend(qkv, window, heads)


def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
    attended: Tensor | None = None,
    attended_gate: Tensor | None = None,
    *,
    window: tuple[int, ...] | None = None,
    grid: tuple[int, ...] | None = None,
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
        window: where given, x, residual and the result lie in the order of windows, ``(B, N, C)`` with memory
            ``(B, *G, *M, C)`` as :func:`~iwin_dit.layers.windows.partition` makes it; it divides the grid.
        grid: needed with ``window``.

    Returns:
        as residual; sums are float32.

    Raises:
        ValueError: where a side of the kernel is even, or the window does not divide the grid.
        RuntimeError: on a CPU without Triton's interpreter.
    """
    from iwin_dit.layers.kernels.convolution import convolve

    return convolve(x, weight, bias, residual, gate, attended, attended_gate, window, grid)
