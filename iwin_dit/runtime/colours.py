"""Colours as people write them in arguments and configs."""

from __future__ import annotations

import re

from iwin_dit.runtime.errors import ConfigError

Colour = tuple[int, int, int]  # red, green and blue, 0 to 255

NAMED: dict[str, Colour] = {"white": (255, 255, 255), "black": (0, 0, 0)}


def colour(text: str) -> Colour:
    """``white``, ``black``, or ``R,G,B`` with numbers from 0 to 255.

    Raises:
        ConfigError: where it is none of these.
    """
    if text in NAMED:
        return NAMED[text]
    values = [int(part) for part in text.split(",")] if re.fullmatch(r"\d{1,3}(,\d{1,3}){2}", text) else []
    if not values or max(values) > 255:
        expected = "white, black, or three numbers from 0 to 255 such as 240,240,240"
        raise ConfigError(f"found the colour {text[:40]!r}; expected {expected}")
    return values[0], values[1], values[2]


def background(text: str | None) -> Colour | None:
    """What shows through transparent pixels: a :func:`colour`, or None, as older versions left them."""
    return None if text is None else colour(text)
