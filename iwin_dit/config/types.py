"""Values of a config as the types of its keys want them: the annotation alone decides what is accepted.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

import functools
import math
import reprlib
import types
from dataclasses import InitVar, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from iwin_dit.runtime.errors import ConfigError, did_you_mean

T = TypeVar("T")
MAX_INT = 2**63 - 1
MAX_DEPTH = 8  # of values below a key that takes any
MAX_NAME = 80
MAX_FILE_NAME, MAX_PATH = 255, 4096  # bytes that file systems take
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40


def build(content: dict[str, Any], kind: type[T], prefix: str = "") -> T:
    """The dataclass of a recipe, of keys and values as YAML has them.

    Raises:
        ConfigError: naming the key, what was found and what its type expects.
    """
    section: type = kind
    hints, values = types_of(section), {}
    for key, value in content.items():
        read = build(value, hints[key], f"{prefix}{key}.") if is_dataclass(hints[key]) else None
        values[key] = convert(value, hints[key], f"{prefix}{key}") if read is None else read
    try:
        return kind(**values)
    except ValueError as error:  # a spec that contradicts itself says so when it is made
        raise ConfigError(f"{prefix.partition('.')[0]}: {error}") from None


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """The type of each key of a dataclass."""
    hints = get_type_hints(kind)
    return {name: hint.type if isinstance(hint, InitVar) else hint for name, hint in hints.items()}


def check_keys(content: dict[str, Any], kind: Any, where: str = "", prefix: str = "") -> None:
    """Every key is a field of the config, at its level.

    Raises:
        ConfigError: with the nearest name.
    """
    for key, value in content.items():
        hint = types_of(kind).get(key) if isinstance(key, str) else None
        if hint is None:
            name, known = str(key)[:MAX_NAME], types_of(kind)
            near = did_you_mean(name, known, f"expected one of {', '.join(known)}", prefix)
            raise ConfigError(f"{where}{prefix}{name} is not a key; {near}")
        if is_dataclass(hint):
            if not isinstance(value, dict):
                some = ", ".join(f.name for f in fields(hint)[:3])
                raise ConfigError(f"{where}{prefix}{key} is {show(value)}, expected keys such as {some}")
            check_keys(value, hint, where, f"{prefix}{key}.")


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value as its type wants it: lists become tuples and whole numbers floats where these are wanted.

    Raises:
        ConfigError: where it is of another type, null but not optional, or a number that is not finite.
    """
    for option in _options(hint):
        found = _as(value, option)
        if found is not None or (option is type(None) and value is None):
            return found
    raise ConfigError(f"{key} is {show(value)}, expected {words(hint)}{_hint(value, hint)}")


def _hint(value: Any, hint: Any) -> str:
    """What more there is to say about a value of the wrong type."""
    options = _options(hint)
    if isinstance(value, int) and abs(value) > MAX_INT:
        return " of at most 64 bits"
    if isinstance(value, str) and value.startswith("~") and str in options:
        return "; there is no such home folder"
    if isinstance(value, str) and str in options:
        return (
            " that could be a name, without control characters and with at most "
            f"{MAX_FILE_NAME} bytes between slashes, {MAX_PATH} in all"
        )
    return "; put it in quotes" if isinstance(value, (int, float)) and str in options else ""


def show(value: Any) -> str:
    """A value as YAML has it, short."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else _short.repr(value)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _as(value: Any, option: Any) -> Any:
    """The value as one type, or None where it is not of this type."""
    origin, inner = get_origin(option), get_args(option)
    if origin is Literal:
        return value if isinstance(value, str) and value in inner else None
    if origin is list and isinstance(value, list):
        return _all(value, inner * len(value))
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return None if (found := _all(value, inner)) is None else tuple(found)
    if origin is dict and isinstance(value, dict):
        return value if _is_plain(value, MAX_DEPTH) else None
    if option is bool:
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if option is int:
        return value if isinstance(value, int) and abs(value) <= MAX_INT else None
    if option is float and isinstance(value, (int, float)):
        return float(value) if abs(value) <= MAX_INT or math.isfinite(value) else None
    if option is str and isinstance(value, str):
        return value if _is_text(value) and not value.startswith("~") else None
    return None


def _all(values: Any, options: tuple[Any, ...]) -> list[Any] | None:
    found = []
    for value, hint in zip(values, options, strict=True):
        fits = [item for option in _options(hint) if (item := _as(value, option)) is not None]
        if not fits:
            return None
        found.append(fits[0])
    return found


def _is_plain(value: Any, depth: int) -> bool:
    """Whether it is JSON's, with finite numbers and keys that are text."""
    if depth == 0:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_text(k) and _is_plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, str):
        return _is_text(value) or not value
    return value is None or (isinstance(value, (int, float)) and abs(value) <= MAX_INT)


def _is_text(value: str) -> bool:
    """Whether it can be the path of a file: neither empty nor too long, and without control characters."""
    if not value.strip() or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in value):
        return False
    path = value.encode()
    return len(path) < MAX_PATH and all(len(name) <= MAX_FILE_NAME for name in path.split(b"/"))


def words(hint: Any) -> str:
    """What a type expects, in words."""
    option, *others = _options(hint)
    if others:
        return " or ".join(map(words, (option, *others)))
    origin, inner = get_origin(option), get_args(option)
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    if origin is list:
        return f"a list, each {words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {words(inner[0])}"
    if origin is dict:
        return "keys with plain values"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        type(None): "null",
    }[option]
