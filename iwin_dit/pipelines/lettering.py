"""Fonts for names of classes in pictures: Pillow's own has little beyond ASCII, and boxes for the rest."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# looked for where systems keep fonts, in this order; together they have most scripts
FONTS = (
    *(
        "DejaVuSans.ttf",
        "NotoSans-Regular.ttf",
        "LiberationSans-Regular.ttf",
        "Arial.ttf",
        "Arial Unicode.ttf",
    ),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "PingFang.ttc", "msyh.ttc", "wqy-microhei.ttc"),
    *("wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "unifont.ttf"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
    *("NotoSansThai-Regular.ttf", "NotoEmoji-Regular.ttf", "Symbola.ttf"),
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # Pillow has the latter without FreeType
NOBODYS = "\U0010ffff"  # has a glyph in no font, and so is drawn as what is missing


def font_for(text: str, size: int) -> Font | None:
    """The first font here, Pillow's own before others, that has a glyph for each character; else None."""
    letters = {letter for letter in text if not letter.isspace()}
    return next((f for f in _fonts(size) if all(_drawn(f, x) != _drawn(f, NOBODYS) for x in letters)), None)


def _fonts(size: int) -> Iterator[Font]:
    yield ImageFont.load_default(size)
    for name in (*FONTS, *_matplotlibs()):
        if (font := _load(name, size)) is not None:
            yield font


@functools.cache
def _load(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _matplotlibs() -> list[str]:
    """DejaVu Sans comes with matplotlib."""
    package = importlib.util.find_spec("matplotlib")
    if package is None or package.origin is None:
        return []
    return [str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")]


def _drawn(font: Font, letter: str) -> tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def draw_predictions(
    images: Sequence[np.ndarray], labels: Sequence[int], predictions: Sequence[int], names: Sequence[str]
) -> Image.Image:
    """Images ``(H, W, 3)`` uint8, each over the class that was found: green if right, red if wrong.

    Where no font here has the letters of a name, the class's number stands for it.
    """
    columns = 8
    side, gap, text = 96, 8, 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, label, found) in enumerate(zip(images, labels, predictions, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        words = names[found] if found == label else f"{names[found]}, not {names[label]}"
        font = font_for(words, 10)
        if font is None:
            words, font = (str(found) if found == label else f"{found}, not {label}"), font_for("0", 10)
        draw.text((x, y + side), words[:16], fill="green" if found == label else "red", font=font)
    return sheet
