"""The values of an official constructor's arguments, against the kinds that they must have."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Mapping
from typing import Any

from iwin_dit.runtime.errors import listed

COUNT = "a whole number of at least 1"


def check_known(given: Collection[Any], known: Collection[str], what: str = "constructor has") -> None:
    """Every argument is one of the official constructor's.

    Raises:
        ValueError: listing those that are not.
    """
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ValueError(f"unknown arguments {listed(unknown)}; the official {what} {', '.join(known)}")


def check_values(
    config: Mapping[str, Any], examples: Mapping[str, Any], optional: Container[str] = ()
) -> None:
    """Each value has to be of the kind of its example, which mostly is the official default.

    A whole number is at least 1. A number is above 0; where its example is below 1 it is a share, from 0 to
    1. In place of a tuple of whole numbers one of them may stand; a list may be empty where its example is.

    Args:
        optional: names whose value may be None.

    Raises:
        ValueError: with the first value that is not.
    """
    for name, example in examples.items():
        value, (expected, fits) = config.get(name, example), _kind(example)
        if not (fits(value) or (value is None and name in optional)):
            raise ValueError(f"{name} is {value!r:.40}, expected {expected}")


def _kind(example: Any) -> tuple[str, Callable[[Any], bool]]:
    """What values like the example are, in words and as a test."""
    if isinstance(example, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if isinstance(example, int):
        return COUNT, _is_count
    if isinstance(example, float) and example < 1:
        return "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1
    if isinstance(example, float):
        return "a number above 0", lambda value: _is_number(value) and value > 0

    def is_list(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(_is_count, value)) and bool(value or not example)

    words = "a list of whole numbers of at least 1"
    if isinstance(example, tuple):
        return f"{COUNT}, or {words}", lambda value: _is_count(value) or is_list(value)
    return words, is_list


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
