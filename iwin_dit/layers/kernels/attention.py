"""Attention in interleaved windows, straight from the packed projection, as Triton kernels.

Flash attention (Dao et al. 2022; Dao 2023): scores live in registers, the softmax runs along, the backward
pass computes the probabilities again from the logarithm of their sum. What is Iwin's is the address of a row:
a window's tokens stand G apart, so that neither queries, keys and values nor the result are ever permuted.

A head whose width d is no power of two is split: 72 channels are a product over 64 and one over 8, padded to
16.

Legend: B batch, T, H, W sides of the grid (T = 1 of images), M sides of the window, G = ceil(side / M)
windows along an axis, N = prod(M) tokens of a window, K heads, d channels of a head, C = K d.
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
    """What a program of a kernel works on."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and by the largest window, in tokens, that a row serves; the last one serves all that are larger.
# "window" is the backward pass of windows that are a single tile, "queries" and "keys" its halves for others.
TILES: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(64, 64, 4, 2), 256: Tile(128, 64, 4, 2), 1024: Tile(128, 64, 4, 3)},
    "window": {64: Tile(64, 64, 4, 1), 128: Tile(128, 128, 8, 1)},
    "queries": {256: Tile(128, 64, 8, 2), 1024: Tile(128, 64, 8, 3)},
    "keys": {256: Tile(64, 128, 8, 2), 1024: Tile(64, 128, 8, 3)},
}
WIDE = 96  # channels of a head


@triton.jit
def _rows(n, group, T, H, W, GT, GH, GW, MT: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr):
    # Where the n-th tokens of a window stand in the grid, and whether they exist: of n >= N, t >= T.
    w = n % MW * GW + group % GW
    h = n // MW % MH * GH + group // GW % GH
    t = n // (MW * MH) * GT + group // (GW * GH)
    return ((t * H + h) * W + w).to(tl.int64), (t < T) & (h < H) & (w < W)


@triton.jit
def _load_part(
    base, rows, exists, STRIDE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    channels = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * STRIDE + channels[None, :]
    if not FULL:
        x = tl.load(pointers, mask=exists[:, None] & (channels < D)[None, :], other=0.0)
    elif START + WIDTH > D:
        x = tl.load(pointers, mask=(channels < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _load(
    base, rows, exists, STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    # A head's rows in two parts, zeros where there is none.
    x1 = _load_part(base, rows, exists, STRIDE, 0, D1, D, FULL)
    x2 = x1
    if D > D1:
        x2 = _load_part(base, rows, exists, STRIDE, D1, D2, D, FULL)
    return x1, x2


@triton.jit
def _store(
    base, rows, exists, x1, x2, STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, D1)
    pointers = base + rows[:, None] * STRIDE
    mask = exists[:, None] & (channels < D)[None, :]
    tl.store(pointers + channels[None, :], x1.to(base.dtype.element_ty), mask=mask)
    if D > D1:
        rest = D1 + tl.arange(0, D2)
        mask = exists[:, None] & (rest < D)[None, :]
        tl.store(pointers + rest[None, :], x2.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _inner(a1, a2, b1, b2, D: tl.constexpr, D1: tl.constexpr):
    # Inner products of rows: (rows of a, rows of b).
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D > D1:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def _mix(sum1, sum2, p, x1, x2, D: tl.constexpr, D1: tl.constexpr):
    # sum + p x
    p = p.to(x1.dtype)
    sum1 = tl.dot(p, x1, sum1, input_precision="ieee")
    if D > D1:
        sum2 = tl.dot(p, x2, sum2, input_precision="ieee")
    return sum1, sum2


@triton.jit
def _delta(o1, o2, do1, do2, D: tl.constexpr, D1: tl.constexpr):
    # The gradient's part along the output, by row.
    delta = tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    if D > D1:
        delta += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)
    return delta


@triton.jit
def _place(blocks, GT, GH, GW, T, H, W, HEADS: tl.constexpr):
    # Of this program: tile, head, window of the batch, window of the image, first token of the image.
    program = tl.program_id(0)
    head = program // blocks % HEADS
    window = (program // (blocks * HEADS)).to(tl.int64)
    windows = GT * GH * GW
    group = (window % windows).to(tl.int32)
    return program % blocks, head, window, group, window // windows * T * H * W


@triton.jit
def _forward_kernel(
    qkv, out, lse, scale, blocks, T, H, W, GT, GH, GW, MT: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = MT * MH * MW
    C: tl.constexpr = HEADS * D
    block, head, window, group, image = _place(blocks, GT, GH, GW, T, H, W, HEADS)
    base = qkv + image * (3 * C) + head * D
    n = block * QUERIES + tl.arange(0, QUERIES)
    rows, exists = _rows(n, group, T, H, W, GT, GH, GW, MT, MH, MW)
    q1, q2 = _load(base, rows, exists, 3 * C, D, D1, D2, FULL)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    o1 = tl.zeros((QUERIES, D1), tl.float32)
    o2 = tl.zeros((QUERIES, D2), tl.float32)
    for start in range(0, N, KEYS):
        keys, real = _rows(start + tl.arange(0, KEYS), group, T, H, W, GT, GH, GW, MT, MH, MW)
        k1, k2 = _load(base + C, keys, real, 3 * C, D, D1, D2, FULL)
        v1, v2 = _load(base + 2 * C, keys, real, 3 * C, D, D1, D2, FULL)
        scores = _inner(q1, q2, k1, k2, D, D1)
        if not FULL:  # the first token of every window exists: `largest` is finite from the first tile on
            scores = tl.where(real[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        o1, o2 = _mix(o1 * shrink[:, None], o2 * shrink[:, None], p, v1, v2, D, D1)
        largest = larger
    share = 1.0 / total
    _store(out + image * C + head * D, rows, exists, o1 * share[:, None], o2 * share[:, None], C, D, D1, D2)
    tl.store(lse + (window * HEADS + head) * N + n, largest + tl.log2(total), mask=exists)


@triton.jit
def _probabilities(scores, scale, lse, visible, FULL: tl.constexpr):
    # From the scores and the logarithm of their sum; a key that does not exist could overflow.
    p = tl.exp2(scores * scale - lse)
    if not FULL:
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _window_backward_kernel(
    grad, qkv, out, lse, dqkv, scale, score_scale, blocks, T, H, W, GT, GH, GW,
    MT: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # All gradients of one head of a window that is a single tile.
    N: tl.constexpr = MT * MH * MW
    C: tl.constexpr = HEADS * D
    _, head, window, group, image = _place(blocks, GT, GH, GW, T, H, W, HEADS)
    base = qkv + image * (3 * C) + head * D
    n = tl.arange(0, QUERIES)
    rows, exists = _rows(n, group, T, H, W, GT, GH, GW, MT, MH, MW)
    q1, q2 = _load(base, rows, exists, 3 * C, D, D1, D2, FULL)
    k1, k2 = _load(base + C, rows, exists, 3 * C, D, D1, D2, FULL)
    v1, v2 = _load(base + 2 * C, rows, exists, 3 * C, D, D1, D2, FULL)
    o1, o2 = _load(out + image * C + head * D, rows, exists, C, D, D1, D2, FULL)
    do1, do2 = _load(grad + image * C + head * D, rows, exists, C, D, D1, D2, FULL)
    row_lse = tl.load(lse + (window * HEADS + head) * N + n, mask=exists, other=0.0)
    delta = _delta(o1, o2, do1, do2, D, D1)
    zeros1 = tl.zeros((QUERIES, D1), tl.float32)
    zeros2 = tl.zeros((QUERIES, D2), tl.float32)
    to = dqkv + image * (3 * C) + head * D

    p = _probabilities(_inner(q1, q2, k1, k2, D, D1), scale, row_lse[:, None], exists[None, :], FULL)
    dv1, dv2 = _mix(zeros1, zeros2, tl.trans(p.to(do1.dtype)), do1, do2, D, D1)
    _store(to + 2 * C, rows, exists, dv1, dv2, 3 * C, D, D1, D2)
    ds = p * (_inner(do1, do2, v1, v2, D, D1) - delta[:, None]) * score_scale
    ds = ds.to(q1.dtype)
    dq1, dq2 = _mix(zeros1, zeros2, ds, k1, k2, D, D1)
    _store(to, rows, exists, dq1, dq2, 3 * C, D, D1, D2)
    dk1, dk2 = _mix(zeros1, zeros2, tl.trans(ds), q1, q2, D, D1)
    _store(to + C, rows, exists, dk1, dk2, 3 * C, D, D1, D2)


@triton.jit
def _queries_backward_kernel(
    grad, qkv, out, lse, delta, dqkv, scale, score_scale, blocks, T, H, W, GT, GH, GW,
    MT: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Gradients of the queries, and delta, which those of keys and values need.
    N: tl.constexpr = MT * MH * MW
    C: tl.constexpr = HEADS * D
    block, head, window, group, image = _place(blocks, GT, GH, GW, T, H, W, HEADS)
    base = qkv + image * (3 * C) + head * D
    n = block * QUERIES + tl.arange(0, QUERIES)
    rows, exists = _rows(n, group, T, H, W, GT, GH, GW, MT, MH, MW)
    q1, q2 = _load(base, rows, exists, 3 * C, D, D1, D2, FULL)
    o1, o2 = _load(out + image * C + head * D, rows, exists, C, D, D1, D2, FULL)
    do1, do2 = _load(grad + image * C + head * D, rows, exists, C, D, D1, D2, FULL)
    place = (window * HEADS + head) * N + n
    row_lse = tl.load(lse + place, mask=exists, other=0.0)
    row_delta = _delta(o1, o2, do1, do2, D, D1)
    tl.store(delta + place, row_delta, mask=exists)
    dq1 = tl.zeros((QUERIES, D1), tl.float32)
    dq2 = tl.zeros((QUERIES, D2), tl.float32)
    for start in range(0, N, KEYS):
        keys, real = _rows(start + tl.arange(0, KEYS), group, T, H, W, GT, GH, GW, MT, MH, MW)
        k1, k2 = _load(base + C, keys, real, 3 * C, D, D1, D2, FULL)
        v1, v2 = _load(base + 2 * C, keys, real, 3 * C, D, D1, D2, FULL)
        p = _probabilities(_inner(q1, q2, k1, k2, D, D1), scale, row_lse[:, None], real[None, :], FULL)
        ds = p * (_inner(do1, do2, v1, v2, D, D1) - row_delta[:, None])
        dq1, dq2 = _mix(dq1, dq2, ds, k1, k2, D, D1)
    to = dqkv + image * (3 * C) + head * D
    _store(to, rows, exists, dq1 * score_scale, dq2 * score_scale, 3 * C, D, D1, D2)


@triton.jit
def _keys_backward_kernel(
    grad, qkv, lse, delta, dqkv, scale, score_scale, blocks, T, H, W, GT, GH, GW,
    MT: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Gradients of keys and values; scores are transposed: (keys, queries).
    N: tl.constexpr = MT * MH * MW
    C: tl.constexpr = HEADS * D
    block, head, window, group, image = _place(blocks, GT, GH, GW, T, H, W, HEADS)
    base = qkv + image * (3 * C) + head * D
    keys, real = _rows(block * KEYS + tl.arange(0, KEYS), group, T, H, W, GT, GH, GW, MT, MH, MW)
    k1, k2 = _load(base + C, keys, real, 3 * C, D, D1, D2, FULL)
    v1, v2 = _load(base + 2 * C, keys, real, 3 * C, D, D1, D2, FULL)
    dk1 = tl.zeros((KEYS, D1), tl.float32)
    dk2 = tl.zeros((KEYS, D2), tl.float32)
    dv1 = tl.zeros((KEYS, D1), tl.float32)
    dv2 = tl.zeros((KEYS, D2), tl.float32)
    first = (window * HEADS + head) * N
    for start in range(0, N, QUERIES):
        n = start + tl.arange(0, QUERIES)
        rows, exists = _rows(n, group, T, H, W, GT, GH, GW, MT, MH, MW)
        q1, q2 = _load(base, rows, exists, 3 * C, D, D1, D2, FULL)
        do1, do2 = _load(grad + image * C + head * D, rows, exists, C, D, D1, D2, FULL)
        if FULL:
            row_lse = tl.load(lse + first + n)
            row_delta = tl.load(delta + first + n)
        else:
            row_lse = tl.load(lse + first + n, mask=exists, other=0.0)
            row_delta = tl.load(delta + first + n, mask=exists, other=0.0)
        p = _probabilities(_inner(k1, k2, q1, q2, D, D1), scale, row_lse[None, :], real[:, None], FULL)
        dv1, dv2 = _mix(dv1, dv2, p, do1, do2, D, D1)
        ds = p * (_inner(v1, v2, do1, do2, D, D1) - row_delta[None, :])
        dk1, dk2 = _mix(dk1, dk2, ds, q1, q2, D, D1)
    to = dqkv + image * (3 * C) + head * D
    _store(to + C, keys, real, dk1 * score_scale, dk2 * score_scale, 3 * C, D, D1, D2)
    _store(to + 2 * C, keys, real, dv1, dv2, 3 * C, D, D1, D2)


def tile_of(kernel: str, tokens: int, qkv: Tensor, heads: int) -> Tile:
    """The tile of windows of so many tokens; in float32 a small one, whose products need more registers."""
    table = TILES[kernel]
    found = next((table[size] for size in sorted(table) if tokens <= size), table[max(table)])
    largest = min(32 if qkv.dtype == torch.float32 else 1024, max(16, triton.next_power_of_2(tokens)))
    # three stages of wide heads are too much for the shared memory of all but data centres' cards
    stages = min(found.stages, 3 if qkv.shape[-1] // (3 * heads) <= WIDE else 2)
    return Tile(min(found.queries, largest), min(found.keys, largest), found.warps, stages)


def _sizes(qkv: Tensor, window: Sequence[int], heads: int) -> dict[str, int]:
    """Where tokens stand and how heads are split, as the kernels' arguments."""
    ones = (1,) * (5 - qkv.ndim)  # axes that the grid lacks
    grid, window = (*ones, *qkv.shape[1:-1]), (*ones, *window)
    sizes = dict(zip(("T", "H", "W"), grid, strict=True))
    sizes |= dict(zip(("MT", "MH", "MW"), window, strict=True))
    sizes |= {f"G{side}": -(-sizes[side] // sizes[f"M{side}"]) for side in "THW"}
    width = qkv.shape[-1] // (3 * heads)
    part = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(max(1, width - part)))
    return sizes | {"HEADS": heads, "D": width, "D1": part, "D2": rest}


def _launch(
    kernel: Any, tile: Tile, block: int, sizes: dict[str, int], first: Tensor, *others: Tensor | float
) -> None:
    """One program for each ``block`` tokens of each head and window, with these arguments."""
    tokens, windows = (math.prod(sizes[f"{letter}{side}"] for side in "THW") for letter in "MG")
    blocks = triton.cdiv(tokens, block)
    whole = all(sizes[side] == sizes[f"G{side}"] * sizes[f"M{side}"] for side in "THW")
    if not first.is_cuda and isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton's kernels need CUDA, or TRITON_INTERPRET=1 set before triton is imported")
    with torch.cuda.device_of(first):
        kernel[(len(first) * windows * sizes["HEADS"] * blocks,)](
            first,
            *others,
            blocks=blocks,
            **sizes,
            FULL=whole and tokens % max(tile.queries, tile.keys) == 0,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


@torch.library.custom_op("iwin_dit::interleaved_attention", mutates_args=())
def attend(qkv: Tensor, window: Sequence[int], heads: int) -> tuple[Tensor, Tensor]:
    """The result ``(B, *grid, C)``, and the logarithm of the sum of each row of scores, for its gradient."""
    qkv = qkv.contiguous()
    out, lse = _attend_fake(qkv, window, heads)
    tile = tile_of("forward", math.prod(window), qkv, heads)
    scale = _scale(qkv, heads) * math.log2(math.e)
    _launch(_forward_kernel, tile, tile.queries, _sizes(qkv, window, heads), qkv, out, lse, scale)
    return out, lse


@attend.register_fake
def _attend_fake(qkv: Tensor, window: Sequence[int], heads: int) -> tuple[Tensor, Tensor]:
    groups = math.prod(-(-side // m) for side, m in zip(qkv.shape[1:-1], window, strict=True))
    lse = qkv.new_empty(len(qkv) * groups, heads, math.prod(window), dtype=torch.float32)
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3), lse


@torch.library.custom_op("iwin_dit::interleaved_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, window: Sequence[int], heads: int
) -> Tensor:
    grad, qkv = grad.contiguous(), qkv.contiguous()
    dqkv, tokens, sizes = torch.empty_like(qkv), math.prod(window), _sizes(qkv, window, heads)
    score_scale = _scale(qkv, heads)
    scales = score_scale * math.log2(math.e), score_scale
    tile = tile_of("window", tokens, qkv, heads)
    if tokens <= tile.queries:
        _launch(_window_backward_kernel, tile, tokens, sizes, grad, qkv, out, lse, dqkv, *scales)
        return dqkv
    delta = torch.empty_like(lse)
    tile = tile_of("queries", tokens, qkv, heads)
    _launch(_queries_backward_kernel, tile, tile.queries, sizes, grad, qkv, out, lse, delta, dqkv, *scales)
    tile = tile_of("keys", tokens, qkv, heads)
    _launch(_keys_backward_kernel, tile, tile.keys, sizes, grad, qkv, lse, delta, dqkv, *scales)
    return dqkv


_attend_backward.register_fake(
    lambda grad, qkv, *others: torch.empty_like(qkv, memory_format=torch.contiguous_format)
)


def _scale(qkv: Tensor, heads: int) -> float:
    return (qkv.shape[-1] // (3 * heads)) ** -0.5


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.window, ctx.heads = inputs
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _attend_backward(grad, *ctx.saved_tensors, ctx.window, ctx.heads), None, None


attend.register_autograd(_differentiate, setup_context=_save)
