"""Draws docs/windows.png: which tokens one window connects, Swin beside Iwin.

The grid is 16 x 16, the windows are 8 x 8.

    python docs/draw_windows.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from iwin_dit.layers.windows import partition

SIDE, WINDOW, TOKEN = 16, 8, (5, 9)
COLOURS = matplotlib.colors.ListedColormap(["#f0f0f0", "#2a78b5", "#f0a030"])


def same_window(interleaved: bool) -> torch.Tensor:
    """True where a token shares a window with TOKEN, by the windows that the model uses: (SIDE, SIDE)."""
    number = torch.arange(SIDE * SIDE).reshape(1, SIDE, SIDE, 1)
    windows = partition(number, (WINDOW, WINDOW), interleaved)[..., 0]
    mine = windows[(windows == number[0, TOKEN[0], TOKEN[1], 0]).any(1)].flatten()
    return torch.isin(number[0, ..., 0], mine)


def draw(axes, title: str, colour: torch.Tensor) -> None:
    axes.imshow(colour, cmap=COLOURS, vmin=0, vmax=2)
    axes.set_xticks(torch.arange(-0.5, SIDE).tolist(), [])
    axes.set_yticks(torch.arange(-0.5, SIDE).tolist(), [])
    axes.grid(color="white", linewidth=1)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    outline = dict(fill=False, edgecolor="black", linewidth=2)
    axes.add_patch(Rectangle((TOKEN[1] - 0.5, TOKEN[0] - 0.5), 1, 1, **outline))
    axes.set_title(f"{title}\n{int((colour > 0).sum()) - 1} other tokens", fontsize=10)


def main() -> None:
    row, column = TOKEN
    neighbours = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    neighbours[row - 1 : row + 2, column - 1 : column + 2] = True
    swin, iwin = same_window(interleaved=False), same_window(interleaved=True)
    both = torch.where(iwin, 1, torch.where(neighbours, 2, 0))
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    draw(panels[0], "Swin: a window of neighbours", swin.int())
    draw(panels[1], "Iwin attention: every second token", iwin.int())
    draw(panels[2], "Iwin attention and 3 x 3 convolution", both)
    figure.savefig(Path(__file__).with_name("windows.png"), dpi=110)


if __name__ == "__main__":
    main()
