"""The values of an official constructor's arguments, against the kinds that they must have."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping
from typing import Any

from iwin_dit.runtime.errors import listed


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
        value = config.get(name, example)
        if not (_fits(value, example) or (value is None and name in optional)):
            raise ValueError(f"{name} is {_shown(value)}, expected {_expected(example)}")


def _fits(value: Any, example: Any) -> bool:
    if isinstance(example, bool):
        return isinstance(value, bool)
    if isinstance(example, int):
        return _is_count(value)
    if isinstance(example, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_number and (0 <= value <= 1 if example < 1 else value > 0)
    if isinstance(example, tuple) and _is_count(value):
        return True
    is_list = isinstance(value, list | tuple) and all(map(_is_count, value))
    return is_list and bool(value or not example)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _expected(example: Any) -> str:
    if isinstance(example, bool):
        return "true or false"
    if isinstance(example, int):
        return "a whole number of at least 1"
    if isinstance(example, float):
        return "a number from 0 to 1" if example < 1 else "a number above 0"
    one = "a whole number of at least 1, or " if isinstance(example, tuple) else ""
    return f"{one}a list of whole numbers of at least 1"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
