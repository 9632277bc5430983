"""Images, truth and predictions side by side, with a legend of colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

IGNORED = 255
SIDE, GAP, LINE = 112, 6, 16  # pixels of a panel, between panels, and of a line of text


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 ``(256, 3)``: hues apart by the golden ratio; the first is dark."""
    colours = np.zeros((256, 3), np.uint8)
    for number in range(num_classes):
        light = 0.95 - 0.25 * (number // 8 % 3)
        rgb = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, light)
        colours[number] = [round(255 * value) for value in rgb]
    colours[0], colours[IGNORED] = (60, 60, 70), (255, 255, 255)
    return colours


def draw_predictions(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: Sequence[str], columns: int = 2
) -> Image.Image:
    """A sheet of triples.

    Args:
        rows: image ``(H, W, 3)`` uint8, truth and prediction ``(H, W)``, of one size in a row.
        columns: triples beside each other.
    """
    colours = palette(len(class_names))
    shown = sorted(
        {int(label) for _, *masks in rows for mask in masks for label in np.unique(mask)} - {IGNORED}
    )
    per_line, width = 5, columns * (3 * (SIDE + GAP) + GAP) + GAP
    lines, height = -(-len(shown) // per_line), -(-len(rows) // columns) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, LINE + height + GAP + lines * LINE), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pixels, *masks) in enumerate(rows):
        x = GAP + number % columns * (3 * (SIDE + GAP) + GAP)
        y = LINE + number // columns * (SIDE + GAP)
        for title, panel in zip(
            ("image", "truth", "prediction"), (pixels, *map(colours.__getitem__, masks)), strict=True
        ):
            pen.text((x, 2), title, fill="black")
            sheet.paste(Image.fromarray(panel).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
            x += SIDE + GAP
    for place, label in enumerate(shown):
        x = GAP + place % per_line * (width // per_line)
        y = LINE + height + place // per_line * LINE
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=tuple(map(int, colours[label])))
        pen.text((x + 15, y + 1), class_names[label][:20], fill="black")
    return sheet
