"""Draws what one output token depends on after 1, 2 and 3 blocks: Iwin beside Swin, on one grid.

What is drawn is measured: the size of the gradient of an output token with respect to each input token,
averaged over random inputs and weights. The shares count input tokens whose gradient is not zero.

``python examples/receptive_field.py --out docs/receptive_field.png``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from iwin_dit.layers.iwin import IwinMixer
from iwin_dit.layers.specs import BlockSpec, MixerSpec
from iwin_dit.models.stages import IwinBlock
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, Parser, run_script
from iwin_dit.runtime.seeds import derive_seed, generator

WIDTH, HEADS = 32, 2
NOTHING = 1e-20  # of the largest gradient: Swin hides keys by -100, which leaves them e^-100


def build(kind: str, depth: int, side: int, window: int, seed: int) -> nn.Module:
    """``depth`` blocks of ``iwin`` or ``swin`` on a square grid: ``(B, H, W, C) -> (B, H, W, C)``.

    Swin's blocks are timm's, every second one shifted by half a window. Weights are Xavier's in both.
    """
    grid, spec = (side, side), BlockSpec(WIDTH, HEADS, mixer=MixerSpec(window_size=window), norm="layer_norm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("receptive field", kind, seed))
        if kind == "iwin":
            blocks = [IwinBlock(spec, IwinMixer(spec, grid), 0.0) for _ in range(depth)]
        else:
            shifts = [window // 2 if i % 2 else 0 for i in range(depth)]
            blocks = [
                SwinTransformerBlock(WIDTH, grid, HEADS, window_size=window, shift_size=shift)
                for shift in shifts
            ]
        stack = nn.Sequential(*blocks)
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return stack.eval()


def influence(stack: nn.Module, side: int, tokens: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Size of the gradient of each of these output tokens, of one random input: ``(len(tokens), H, W)``.

    The gradient is of the token's product with a random vector; its size is the norm over channels.
    """
    random = generator("receptive field", "input", seed)
    x = torch.randn(1, side, side, WIDTH, generator=random)
    direction = torch.randn(WIDTH, generator=random)
    x = x.repeat(len(tokens), 1, 1, 1).requires_grad_()  # a copy for each token: all in one backward pass
    rows, columns = torch.tensor(tokens).unbind(1)
    out = stack(x)[torch.arange(len(tokens)), rows, columns]
    (gradient,) = torch.autograd.grad((out * direction).sum(), x)
    return gradient.norm(dim=-1)


def reached(sizes: Tensor) -> Tensor:
    """Where the gradient is more than rounding: ``(N, H, W)``."""
    return sizes > NOTHING * sizes.amax((-2, -1), keepdim=True)


def measure(kind: str, depth: int, arguments: argparse.Namespace) -> tuple[Tensor, float, float]:
    """The averaged map of the token, the share of tokens that it depends on, and the mean share of all."""
    side, window, token = arguments.side, arguments.window, tuple(arguments.token)
    maps = []
    for weights in range(arguments.initialisations):
        stack = build(kind, depth, side, window, arguments.seed + weights)
        for i in range(arguments.inputs):
            maps.append(influence(stack, side, [token], derive_seed(arguments.seed, weights, i))[0])
    mean = torch.stack(maps).mean(0)
    everywhere = [(row, column) for row in range(side) for column in range(side)]
    rows = [everywhere[i : i + side] for i in range(0, side**2, side)]
    pairs = torch.cat([reached(influence(stack, side, row, arguments.seed)) for row in rows])
    return mean, share(reached(mean[None])), share(pairs)


def share(mask: Tensor) -> float:
    return mask.double().mean().item()


def draw(maps: dict[str, list[tuple[Tensor, float, float]]], arguments: argparse.Namespace) -> None:
    """One row per kind, one column per depth; colours are logarithmic, grey is no influence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    colours = plt.get_cmap("viridis").with_extremes(bad="#dddddd", under="#dddddd")
    depths = arguments.blocks
    figure, panels = plt.subplots(
        len(maps), depths, figsize=(2.7 * depths + 0.8, 2.9 * len(maps)), layout="constrained", squeeze=False
    )
    for row, (kind, measured) in zip(panels, maps.items(), strict=True):
        row[0].set_ylabel(kind.capitalize())
        for depth, (panel, (sizes, part, _)) in enumerate(zip(row, measured, strict=True), start=1):
            relative = (sizes / sizes.max()).where(reached(sizes[None])[0], torch.nan)
            shown = panel.imshow(
                relative.numpy(), cmap=colours, norm=LogNorm(1e-4, 1), interpolation="nearest"
            )
            y, x = arguments.token
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
            panel.set_title(f"{depth} block{'s' * (depth > 1)}: {part:.0%} of the tokens", fontsize=9)
            panel.set_xticks([])
            panel.set_yticks([])
    figure.colorbar(shown, ax=panels, shrink=0.8, label="gradient, relative to the largest")
    try:
        figure.savefig(arguments.out, dpi=100)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out} cannot be written: {error.strerror}") from None
    plt.close(figure)


def parse_arguments(command: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--side", type=int, default=21, help="tokens along a side of the grid (21)")
    add("--window", type=int, default=7, help="tokens along a side of a window; divides the side (7)")
    add("--blocks", type=int, default=3, help="the deepest stack (3)")
    add("--token", type=int, nargs=2, default=(5, 8), metavar=("ROW", "COLUMN"), help="output token (5 8)")
    add("--inputs", type=int, default=8, help="random inputs of each initialisation (8)")
    add("--initialisations", type=int, default=4, help="random weights (4)")
    add("--seed", type=int, default=0, help="of weights and inputs (0)")
    add("--out", type=Path, default=Path("receptive_field.png"), help="(receptive_field.png)")
    arguments = parser.parse_args(command)
    for name in ("side", "window", "blocks", "inputs", "initialisations"):
        if (value := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name} is {value}, expected at least 1")
    if arguments.side % arguments.window or arguments.side == arguments.window:
        raise ConfigError(
            f"--window is {arguments.window}, expected a proper divisor of the side, {arguments.side}"
        )
    if not all(0 <= place < arguments.side for place in arguments.token):
        raise ConfigError(f"--token is {tuple(arguments.token)}, expected 0 to {arguments.side - 1}")
    files.check_writable(arguments.out, "--out", is_file=True)
    return arguments


def main(command: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(command)
    depths = range(1, arguments.blocks + 1)
    maps = {kind: [measure(kind, depth, arguments) for depth in depths] for kind in ("iwin", "swin")}
    draw(maps, arguments)
    print(f"grid {arguments.side} x {arguments.side}, window {arguments.window} x {arguments.window}")
    print("| blocks | Iwin: token of the picture | Iwin: mean of all | Swin: token | Swin: mean of all |")
    print("|---|---|---|---|---|")
    for depth, iwin, swin in zip(depths, *maps.values(), strict=True):
        print(f"| {depth} | " + " | ".join(f"{100 * part:.1f} %" for part in (*iwin[1:], *swin[1:])) + " |")


if __name__ == "__main__":
    run_script(main)
