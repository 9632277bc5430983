"""The Triton kernels of the Iwin module beside PyTorch's operations, on a CUDA device.

    python benchmarks/kernels.py [--cuda-graphs]     times
    python benchmarks/kernels.py --check             equality with float64, gradients too
    python benchmarks/kernels.py --tune              the fastest tiles, to be written into the kernels' tables

XL's attention (width 1152, 16 heads of 72 channels) and its 3 x 3 convolution with gate and residual,
bfloat16, 16,384 tokens a batch, two windows along each axis. Times are medians. *permute, SDPA, permute*
starts and ends in the grid's order as the kernel does; *SDPA alone* has windows that are contiguous already.
Attention counts as 4 N C operations a token (N tokens of a window, C channels), with backward 3.5 times that;
of the convolution the bytes count that must move: 10 a value, 18 with backward.
With ``TRITON_INTERPRET=1`` the check runs without a GPU, at toy size.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iwin_dit.layers import kernels, windows
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.progress import progress

TOKENS, WIDTH, HEADS = 16_384, 1152, 16
WINDOWS = (64, 256, 1024, 4096)  # tokens
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CHECKS = [  # grid, window, heads, channels of a head, on a GPU
    *[((2 * m, 2 * m), (m, m), HEADS, WIDTH // HEADS) for m in (8, 16, 32)],
    ((30, 45), (8, 16), 6, 64),
    ((17, 23), (17, 23), 3, 24),
    ((5, 9, 14), (5, 4, 8), 4, 72),
    ((16, 16), (4, 4), 2, 8),
    ((32, 32), (16, 16), 4, 128),
]
TOY_CHECKS = [((4, 6), (2, 3), 2, 8), ((5, 3), (2, 2), 1, 24), ((2, 3, 3), (2, 2, 2), 1, 16)]


# -- What is compared


def permuted_sdpa(qkv: Tensor, window: tuple[int, ...], heads: int) -> Tensor:
    """Attention in interleaved windows by PyTorch: ``(B, *grid, 3 C) -> (B, *grid, C)``."""
    grid = tuple(qkv.shape[1:-1])
    padded, mask = windows.padded_grid(grid, window), None
    if padded != grid:
        real = windows.partition(windows.real_tokens(grid, padded, qkv.device), window)
        mask = real.repeat(len(qkv), 1, 1)[:, None, None, :, 0]
    rows = sdpa(windows.partition(windows.pad(qkv, padded), window), heads, mask)
    return windows.crop(windows.reverse(rows, window, padded), grid)


def sdpa(rows: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of packed rows: ``(windows, N, 3 C) -> (windows, N, C)``."""
    q, k, v = rows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """The convolution, its gate and the residual by PyTorch."""
    conv = F.conv2d if x.ndim == 4 else F.conv3d
    padding = [side // 2 for side in weight.shape[2:]]
    y = conv(x.movedim(-1, 1), weight.to(x.dtype), bias.to(x.dtype), padding=padding, groups=len(weight))
    return torch.addcmul(residual, gate.to(residual.dtype), y.movedim(1, -1).to(residual.dtype))


def shifted(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """The same of images as a sum of shifted products, which a compiler can fuse."""
    height, width = x.shape[1:3]
    (kh, kw), total = weight.shape[2:], bias.float()
    wide = F.pad(x, (0, 0, kw // 2, kw // 2, kh // 2, kh // 2))
    for i, j in itertools.product(range(kh), range(kw)):
        total = total + wide[:, i : i + height, j : j + width].float() * weight[:, 0, i, j].float()
    return residual + gate.to(residual.dtype) * total


# -- Times


def milliseconds(function: Callable[[], object], cuda_graphs: bool = False) -> float:
    """Median on the device; graphs leave out what the host needs to launch."""
    from triton.testing import do_bench, do_bench_cudagraph

    if cuda_graphs:
        return do_bench_cudagraph(function, rep=30, return_mode="median")
    return do_bench(function, warmup=10, rep=60, return_mode="median")


def both(function: Callable[..., Tensor], tensors: list[Tensor], cuda_graphs: bool) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    grad = torch.randn_like(function(*tensors))

    def forward() -> None:
        with torch.no_grad():
            function(*tensors)

    def step() -> None:
        torch.autograd.grad(function(*tensors), tensors, grad)

    return milliseconds(forward, cuda_graphs), milliseconds(step, cuda_graphs)


def setting(
    tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """Window, grid and packed projections for windows of so many tokens, two along each axis."""
    side = math.isqrt(tokens)
    grid = (2 * side, 2 * side)
    qkv = torch.randn(TOKENS // (4 * tokens), *grid, 3 * WIDTH, device="cuda", dtype=dtype)
    return (side, side), grid, qkv.requires_grad_()


def attention_variants(
    tokens: int,
) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor], SDPBackend | None]]:
    window, _, qkv = setting(tokens)
    yield "kernel", lambda x: kernels.interleaved_attention(x, window, HEADS), [qkv], None
    rows = windows.partition(qkv.detach(), window).requires_grad_()
    for name, backend in BACKENDS.items():
        yield f"permute, SDPA ({name}), permute", lambda x: permuted_sdpa(x, window, HEADS), [qkv], backend
    for name, backend in BACKENDS.items():
        yield f"SDPA ({name}) alone", lambda x: sdpa(x, HEADS), [rows], backend


def print_attention(cuda_graphs: bool) -> None:
    print_row("window, tokens", "attention", "forward, ms", "TFLOP/s", "forward + backward, ms", "TFLOP/s")
    print_row(*["---"] * 6)
    for tokens in WINDOWS:
        flops = 4 * TOKENS * tokens * WIDTH
        for name, function, tensors, backend in attention_variants(tokens):
            try:
                with sdpa_kernel(backend or list(BACKENDS.values())):
                    forward, step = both(function, tensors, cuda_graphs)
            except RuntimeError as error:
                print_row(tokens, name, f"does not run: {str(error).splitlines()[0][:60]}", "", "", "")
                continue
            rates = [f"{flops / forward / 1e9:.0f}", f"{3.5 * flops / step / 1e9:.0f}"]
            print_row(tokens, name, f"{forward:.3f}", rates[0], f"{step:.3f}", rates[1])


def copy_rate() -> float:
    """GB/s, read and written, of a gibibyte."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def print_convolution(cuda_graphs: bool) -> None:
    print(f"\nA copy on the device moves {copy_rate():.0f} GB/s.\n")
    print_row("tokens", "convolution", "forward, ms", "GB/s", "forward + backward, ms", "GB/s")
    print_row(*["---"] * 6)
    for tokens in (64, 4096):
        _, grid, qkv = setting(tokens)
        values = TOKENS * WIDTH
        tensors = convolution_tensors(len(qkv), grid, WIDTH, (3, 3), torch.bfloat16)
        for name, function in (
            ("kernel", kernels.depthwise_convolution),
            ("conv, addcmul", convolved),
            ("conv, addcmul, compiled", torch.compile(convolved, fullgraph=True, dynamic=False)),
            ("shifted products, compiled", torch.compile(shifted, fullgraph=True, dynamic=False)),
        ):
            forward, step = both(function, tensors, cuda_graphs)
            rates = [f"{10 * values / forward / 1e6:.0f}", f"{18 * values / step / 1e6:.0f}"]
            print_row(4 * tokens, name, f"{forward:.3f}", rates[0], f"{step:.3f}", rates[1])


def convolution_tensors(
    batch: int, grid: tuple[int, ...], width: int, kernel: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """x, weight, bias, residual and gate, between NaNs."""
    ones = [1] * len(grid)
    shapes = [
        ((batch, *grid, width), dtype),
        ((width, 1, *kernel), torch.float32),
        ((width,), torch.float32),
        ((batch, *grid, width), torch.float32),
        ((batch, *ones, width), dtype),
    ]
    return [between_nans(*shape, dtype=dtype).requires_grad_() for shape, dtype in shapes]


def between_nans(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values; whoever reads before or after them reads NaN."""
    memory = torch.full((3, *shape), float("nan"), dtype=dtype, device=device())
    memory[1] = torch.randn(shape, device=device())
    return memory[1].detach()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


# -- Equality


def differences(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor]
) -> list[float]:
    """``|ours - theirs| / |theirs|`` of the result and of each gradient; theirs is float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, expected = kernel(*tensors), plain(*exact)
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, tensors, grad)]
    theirs = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


def check() -> int:
    """One line a case; 1 where one of them differs."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory with NaN before it is written
    on_gpu, failed = device() == "cuda", 0
    dtypes = {torch.float32: 1e-5} | ({torch.bfloat16: 1e-2, torch.float16: 2e-3} if on_gpu else {})
    for (grid, window, heads, head_width), dtype in itertools.product(
        CHECKS if on_gpu else TOY_CHECKS, dtypes
    ):
        width, kernel = heads * head_width, (3,) * len(grid)
        qkv = between_nans(2, *grid, 3 * width, dtype=dtype).requires_grad_()

        def attend(x: Tensor, w: tuple[int, ...] = window, h: int = heads) -> Tensor:
            return kernels.interleaved_attention(x, w, h)

        def plain(x: Tensor, w: tuple[int, ...] = window, h: int = heads) -> Tensor:
            return permuted_sdpa(x, w, h)

        tensors = convolution_tensors(2, grid, width, kernel, dtype)
        pairs = {"attention": (attend, plain, [qkv])}
        pairs["convolution"] = (kernels.depthwise_convolution, convolved, tensors)
        if on_gpu and dtype == torch.bfloat16 and grid == CHECKS[0][0]:
            pairs["compiled attention"] = (torch.compile(attend, fullgraph=True), plain, [qkv])
        for name, case in pairs.items():
            found = differences(*case)
            good = all(error < dtypes[dtype] for error in found)  # not so where one is NaN
            failed += not good
            errors = " ".join(f"{error:.1e}" for error in found)
            about = f"{name}, grid {grid}, window {window}, {heads} x {head_width}, {str(dtype)[6:]}"
            print(f"{'ok    ' if good else 'FAILED'} {about}: {errors}", flush=True)
    return int(failed > 0)


# -- Tiles


def candidates(kernel: str, tokens: int) -> list[tuple[int, int, int, int]]:
    """Tiles of a kernel of attention that are worth a try for windows of so many tokens."""
    if kernel == "window":
        return [(tokens, tokens, warps, 1) for warps in (4, 8) if tokens <= 128]
    first, second = ((64, 128), (32, 64, 128)) if kernel == "forward" else ((64, 128), (64, 128))
    return [
        (queries, keys, warps, stages)
        for queries, keys, warps, stages in itertools.product(first, second, (4, 8), (2, 3))
        if queries <= tokens and keys <= tokens and (kernel == "forward" or tokens > 64)
    ]


@functools.cache
def shipped_tiles() -> dict[str, dict]:
    from iwin_dit.layers.kernels import attention

    return dict(attention.TILES)


def call(kernel: str, tokens: int, tile: tuple[int, ...], batch: int | None = None) -> Callable[[], object]:
    """What runs the kernel (for "queries" and "keys": both) with this tile."""
    from iwin_dit.layers.kernels import attention, convolution

    window, grid, qkv = setting(tokens)
    if kernel.startswith("convolution"):
        name = kernel.removeprefix("convolution ")
        convolution.TILES[name] = {9: convolution.Tile(*tile)}
        tensors = convolution_tensors(batch or len(qkv), grid, WIDTH, (3, 3), torch.bfloat16)
        x, weight, _, residual, gate = (tensor.detach() for tensor in tensors)
        if name == "forward":
            return lambda: kernels.depthwise_convolution(*(tensor.detach() for tensor in tensors))
        inputs = residual, x, weight.flatten(1).T.contiguous(), gate.flatten(1)
        return lambda: convolution._convolve_backward(*inputs, (3, 3))
    attention.TILES.update(shipped_tiles())
    attention.TILES[kernel] = {1 << 20: attention.Tile(*tile)}
    qkv = qkv.detach()[:batch]
    if kernel == "forward":
        return lambda: attention.attend(qkv, window, HEADS)
    out, lse = attention.attend(qkv, window, HEADS)
    grad = torch.randn_like(out)
    return lambda: attention._attend_backward(grad, qkv, out, lse, window, HEADS)


def compile_only(job: tuple[str, int, tuple[int, ...]]) -> None:
    """Runs a kernel once at a small batch, so that it lies in Triton's cache; what cannot run fails later."""
    try:
        call(*job, batch=1)()
        torch.cuda.synchronize()
    except Exception as error:  # of any kind: too much shared memory, too many registers
        print(f"{job}: {type(error).__name__}", flush=True)


def tune() -> None:
    """Prints the best three tiles of each kernel and window."""
    jobs = [
        (kernel, tokens, tile)
        for tokens in WINDOWS
        for kernel in ("forward", "window", "queries", "keys")
        for tile in candidates(kernel, tokens)
    ]
    convolution = itertools.product((8, 16, 32), (64, 128), (4, 8), (1, 4))
    jobs += [("convolution forward", 256, tile) for tile in convolution]
    convolution = itertools.product((4, 8, 16), (64, 128), (4, 8), (8, 16))
    jobs += [("convolution backward", 256, tile) for tile in convolution if tile[0] * tile[1] <= 1024]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        list(progress(pool.imap_unordered(compile_only, jobs), total=len(jobs), desc="compile"))
    found: dict[tuple[str, int], dict[tuple[int, ...], float]] = {}
    for kernel, tokens, tile in progress(jobs, desc="measure"):
        try:
            found.setdefault((kernel, tokens), {})[tile] = milliseconds(call(kernel, tokens, tile))
        except Exception as error:
            print(f"{kernel}, {tokens} tokens, {tile}: {type(error).__name__}", flush=True)
    print_row("kernel", "tokens of a window", "fastest tiles: ms")
    print_row(*["---"] * 3)
    for (kernel, tokens), times in found.items():
        best = sorted(times, key=times.get)[:3]
        print_row(kernel, tokens, "; ".join(f"{tile}: {times[tile]:.3f}" for tile in best))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare values and gradients with float64")
    parser.add_argument("--tune", action="store_true", help="try tiles")
    parser.add_argument("--cuda-graphs", action="store_true", help="leave out what launches cost the host")
    options = parser.parse_args()
    interpreted = options.check and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise ConfigError(
            "this machine has no CUDA device: run it on one, or TRITON_INTERPRET=1 with --check alone"
        )
    torch.manual_seed(0)
    if options.check:
        return check()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    if options.tune:
        tune()
    else:
        print_attention(options.cuda_graphs)
        print_convolution(options.cuda_graphs)
    return 0


if __name__ == "__main__":
    run_script(main)
