"""The depthwise convolution of tokens whose channels are last, with gate and residual, as Triton kernels.

It is bound by memory: forward reads the tokens and the residual once and writes the sum once. Backward
reads the gradient and the tokens once, writes the tokens' gradient, and for each tile the sums

    S[tap] = sum over tokens of gradient * the tap's neighbour,    S[last] = sum over tokens of gradient,

one vector over the channels each, from which the gradients of weight, bias and gate follow by small products.
Sums of tiles are added by PyTorch, always in the same order.

Legend: B batch, T, H, W sides of the grid (T = 1 of images), C channels, K sides of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program of a kernel works on: so many times so many tokens, and so many channels."""

    tokens: int
    channels: int
    warps: int
    steps: int = 1


# By kernel and by the most taps that a row serves: the backward pass keeps a sum for each tap in registers.
TILES: dict[str, dict[int, Tile]] = {
    "forward": {9: Tile(64, 64, 4), 64: Tile(16, 64, 4)},
    "backward": {9: Tile(8, 32, 2, 16), 64: Tile(8, 64, 8, 16)},
}


def tile_of(kernel: str, taps: int, tokens: int) -> Tile:
    """The tile of kernels with so many taps, for images of so many tokens."""
    table = TILES[kernel]
    found = next((table[most] for most in sorted(table) if taps <= most), table[max(table)])
    return found._replace(steps=min(found.steps, triton.cdiv(tokens, found.tokens)))


@triton.jit
def _neighbours(base, t, h, w, channels, T, H, W, C):
    # The tokens of these places in float32, zeros outside of the grid.
    inside = (t >= 0) & (t < T) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    rows = ((t * H + h) * W + w).to(tl.int64)
    mask = inside[:, None] & (channels < C)[None, :]
    return tl.load(base + rows[:, None] * C + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _program(tiles, C, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    # What this program works on: its image, its tile of the batch, its first token, and its channels.
    parts = tl.cdiv(C, CHANNELS)
    tile = (tl.program_id(0) // parts).to(tl.int64)
    channels = tl.program_id(0) % parts * CHANNELS + tl.arange(0, CHANNELS)
    return tile // tiles, tile, (tile % tiles).to(tl.int32) * TOKENS, channels


@triton.jit
def _forward_kernel(
    x, weight, bias, residual, gate, attended, attended_gate, out, attended_gate_stride, gate_stride, tiles,
    T, H, W, C, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KT * KH * KW
    image, _, first, channels = _program(tiles, C, TOKENS * STEPS, CHANNELS)
    start = image * T * H * W * C
    real = channels < C
    shift = tl.load(bias + channels, mask=real, other=0.0).to(tl.float32)[None, :]
    factor = tl.load(gate + image * gate_stride + channels, mask=real, other=0.0).to(tl.float32)[None, :]
    other = factor
    if BESIDE:
        gates = attended_gate + image * attended_gate_stride + channels
        other = tl.load(gates, mask=real, other=0.0).to(tl.float32)[None, :]
    for step in range(STEPS):
        n = first + step * TOKENS + tl.arange(0, TOKENS)
        t, h, w = n // (H * W), n // W % H, n % W
        places = start + n.to(tl.int64)[:, None] * C + channels[None, :]
        mask = (t < T)[:, None] & real[None, :]
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for i in tl.static_range(TAPS):
            tap = tl.load(weight + i * C + channels, mask=real, other=0.0).to(tl.float32)
            near = _neighbours(
                x + start, t + i // (KH * KW) - KT // 2, h + i // KW % KH - KH // 2, w + i % KW - KW // 2,
                channels, T, H, W, C,
            )  # fmt: skip
            total += tap[None, :] * near
        total = tl.load(residual + places, mask=mask, other=0.0).to(tl.float32) + (total + shift) * factor
        if BESIDE:
            total += tl.load(attended + places, mask=mask, other=0.0).to(tl.float32) * other
        tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad, x, weight, gate, dx, sums, gate_stride, tiles, T, H, W, C,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KT * KH * KW
    image, tile, first, channels = _program(tiles, C, TOKENS * STEPS, CHANNELS)
    start = image * T * H * W * C
    real = channels < C
    factor = tl.load(gate + image * gate_stride + channels, mask=real, other=0.0).to(tl.float32)[None, :]
    products = ()  # one for each tap, and the gradient itself; added over tokens at the end. Triton knows
    # tuples alone, and unrolls the loops in which they grow, which a checker of types takes for one type.
    for _ in tl.static_range(TAPS + 1):
        products = products + (tl.zeros((TOKENS, CHANNELS), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for step in range(STEPS):
        n = first + step * TOKENS + tl.arange(0, TOKENS)
        t, h, w = n // (H * W), n // W % H, n % W
        places = start + n.to(tl.int64)[:, None] * C + channels[None, :]
        mask = (t < T)[:, None] & real[None, :]
        here = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        larger = ()
        for i in tl.static_range(TAPS):
            tap = tl.load(weight + i * C + channels, mask=real, other=0.0).to(tl.float32)
            near = _neighbours(  # the token whose result read this one through this tap
                grad + start, t - i // (KH * KW) + KT // 2, h - i // KW % KH + KH // 2, w - i % KW + KW // 2,
                channels, T, H, W, C,
            )  # fmt: skip
            total += tap[None, :] * near
            larger = larger + (products[i] + near * here,)  # type: ignore[assignment]  # noqa: RUF005
        own = _neighbours(grad + start, t, h, w, channels, T, H, W, C)
        products = larger + (products[TAPS] + own,)  # type: ignore[assignment]  # noqa: RUF005
        tl.store(dx + places, (total * factor).to(dx.dtype.element_ty), mask=mask)
    for i in tl.static_range(TAPS + 1):
        tl.store(sums + (tile * (TAPS + 1) + i) * C + channels, tl.sum(products[i], 0), mask=real)


def _launch(
    kernel: Any, tile: Tile, x: Tensor, gate: Tensor, sides: Sequence[int], *arguments: Tensor | int,
    **constants: Any,
) -> None:  # fmt: skip
    """One program for each tile of tokens and channels of each image."""
    if not x.is_cuda and isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton's kernels need CUDA, or TRITON_INTERPRET=1 set before triton is imported")
    _, *grid, channels = x.shape
    ones = (1,) * (3 - len(grid))  # axes that the grid lacks
    tiles = triton.cdiv(math.prod(grid), tile.tokens * tile.steps)
    with torch.cuda.device_of(x):
        kernel[(len(x) * tiles * triton.cdiv(channels, tile.channels),)](
            *arguments,
            gate.stride(0),
            tiles,
            *(*ones, *grid),
            channels,
            *(*ones, *sides),
            TOKENS=tile.tokens,
            CHANNELS=tile.channels,
            STEPS=tile.steps,
            **constants,
            num_warps=tile.warps,
        )


def _rows_contiguous(gate: Tensor) -> Tensor:
    """One of several chunks is no reason to copy."""
    return gate if gate.stride(1) == 1 else gate.contiguous()


@torch.library.custom_op("iwin_dit::depthwise_convolution", mutates_args=())
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor, attended: Tensor | None,
    attended_gate: Tensor | None, sides: Sequence[int],
) -> Tensor:  # fmt: skip
    """As :func:`~iwin_dit.layers.kernels.depthwise_convolution`, with weight (taps, C) and gates (B, C)."""
    x, weight, bias, residual = (tensor.contiguous() for tensor in (x, weight, bias, residual))
    gate, out = _rows_contiguous(gate), torch.empty_like(residual)
    second, other, beside = x, gate, False
    if attended is not None and attended_gate is not None:
        second, other, beside = attended.contiguous(), _rows_contiguous(attended_gate), True
    tensors = x, weight, bias, residual, gate, second, other, out, other.stride(0)
    tile = tile_of("forward", len(weight), math.prod(x.shape[1:-1]))
    _launch(_forward_kernel, tile, x, gate, sides, *tensors, BESIDE=beside)
    return out


convolve.register_fake(
    lambda x, weight, bias, residual, *others: torch.empty_like(
        residual, memory_format=torch.contiguous_format
    )
)


@torch.library.custom_op("iwin_dit::depthwise_convolution_backward", mutates_args=())
def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor]:
    grad, x, weight = (tensor.contiguous() for tensor in (grad, x, weight))
    gate, dx = _rows_contiguous(gate), torch.empty_like(x)
    tokens = math.prod(x.shape[1:-1])
    tile = tile_of("backward", len(weight), tokens)
    tiles = triton.cdiv(tokens, tile.tokens * tile.steps)
    sums = x.new_empty(len(x), tiles, len(weight) + 1, x.shape[-1], dtype=torch.float32)
    _launch(_backward_kernel, tile, x, gate, sides, grad, x, weight, gate, dx, sums)
    return dx, sums.sum(1)


@_convolve_backward.register_fake
def _convolve_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(len(x), len(weight) + 1, x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, gate, attended, attended_gate, ctx.sides = inputs
    ctx.save_for_backward(x, weight, bias, gate, attended, attended_gate)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gate, attended, attended_gate = ctx.saved_tensors
    dx, sums = _convolve_backward(grad, x, weight, gate, ctx.sides)  # (B, .., C), (B, taps + 1, C)
    of_parameters = (sums * gate.float()[:, None]).sum(0)  # (taps + 1, C)
    dweight, dbias = of_parameters[:-1].to(weight.dtype), of_parameters[-1].to(bias.dtype)
    parameters = torch.cat([weight.float(), bias.float()[None]])
    dgate = (sums * parameters).sum(1).to(gate.dtype)  # (B, C)
    beside = None, None
    if attended is not None:
        tokens = tuple(range(1, grad.ndim - 1))
        factor = attended_gate.float().view(len(x), *(1 for _ in tokens), -1)
        dattended_gate = (grad * attended).sum(tokens, dtype=torch.float32)
        beside = (grad * factor).to(attended.dtype), dattended_gate.to(attended_gate.dtype)
    return dx, dweight, dbias, grad, dgate, *beside, None


convolve.register_autograd(_differentiate, setup_context=_save)
