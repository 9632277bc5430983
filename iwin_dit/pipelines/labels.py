"""Class ids of what people write: ids, names and synonyms. What may be two classes is refused.

A class's name is what ``id2label`` says of it, such as ``tench, Tinca tinca``; its synonyms are the parts
between commas.
"""

from __future__ import annotations

import difflib
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

ID = re.compile(r"id:\s*([0-9]{1,18})", re.ASCII)
NAME = "name:"
WHOLE = re.compile(r"-?[0-9]{1,18}", re.ASCII)
NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?", re.ASCII)
MAX_LISTED = 5


class ClassNames:
    """Finds the id of a class.

    A whole number (``2``, not ``"2"``) is an id. A string is looked up by these rules:

    * ``id:2`` is an id and ``name:2`` is a name.
    * A name that is spelled exactly so wins over synonyms, and over names that differ in case, in spaces or,
      of numbers, in the way of writing them (``1``, ``001``, ``1.0``).
    * ``2`` may be an id as well as a name.
    * What may be several classes by these rules is refused, and the error lists them.

    Args:
        names: by id.
    """

    def __init__(self, names: Mapping[int, str]):
        self.names = dict(names)
        self._exact: dict[str, set[int]] = {}
        self._loose: dict[str | Decimal, set[int]] = {}
        for index, name in self.names.items():
            self._exact.setdefault(name, set()).add(index)
            for part in (name, *name.split(",")):
                if part.strip():
                    self._loose.setdefault(_plain(part), set()).add(index)

    def ids(self, class_labels: Any, num_classes: int) -> list[int]:
        """Ids, in the order given, of one label or of several, nested as they like; tensors serve, too.

        Raises:
            ValueError: for an id out of range, an unknown name, with the nearest ones, or one of several
                classes, with their ids.
        """
        if hasattr(class_labels, "tolist"):  # a tensor or an array
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            return [self._id(class_labels, num_classes)]
        return [index for label in class_labels for index in self.ids(label, num_classes)]

    def _id(self, label: Any, num_classes: int) -> int:
        if not isinstance(label, str):
            if isinstance(label, bool) or not hasattr(label, "__index__"):
                raise ValueError(f"class {label!r} is neither a whole number nor a name")
            return _in_range(operator.index(label), num_classes)
        text = label.strip()
        if number := ID.fullmatch(text):
            return _in_range(int(number[1]), num_classes)
        if text.startswith(NAME):
            found = self._named(text.removeprefix(NAME))
        else:
            found = self._named(label)
            if WHOLE.fullmatch(text) and text == str(int(text)) and 0 <= int(text) < num_classes:
                found = found | {int(text)}  # not of 007, which is no way to write an id
        if len(found) == 1:
            return _in_range(min(found), num_classes)
        raise ValueError(self._ambiguous(text, found) if found else self._unknown(text, num_classes))

    def _named(self, text: str) -> set[int]:
        return self._exact.get(text) or self._loose.get(_plain(text), set())

    def _ambiguous(self, text: str, found: set[int]) -> str:
        told = [
            f"id:{index}" + (f" (named {self.names[index]!r:.60})" if index in self.names else "")
            for index in sorted(found)
        ]
        more = f" or {len(told) - MAX_LISTED} others" if len(told) > MAX_LISTED else ""
        by_name = f", or name:{text} for the name" if len(self._named(text)) == 1 else ""
        return (
            f"class {text!r} may be {' or '.join(told[:MAX_LISTED])}{more}; "
            f"say which by its id, such as id:{min(found)}{by_name}"
        )

    def _unknown(self, text: str, num_classes: int) -> str:
        if WHOLE.fullmatch(text):
            number = _in_range(int(text), num_classes)
            return f"class {text!r} is the name of no class; for the number say id:{number}"
        known = [str(name) for name in self._loose]
        near = difflib.get_close_matches(text.removeprefix(NAME).casefold(), known, n=3, cutoff=0.4)
        if near:
            return f"unknown class name {text!r}; nearest names: {', '.join(near)}"
        example = f", such as {', '.join(known[:3])}" if known else ""
        return f"unknown class name {text!r}; the model has {num_classes} classes{example}"


def _plain(name: str) -> str | Decimal:
    """A name without what people do not mind: case, spaces, forms of Unicode, and the zeros of numbers."""
    name = " ".join(unicodedata.normalize("NFC", name).split()).casefold()
    return Decimal(name) if NUMBER.fullmatch(name) else name


def _in_range(index: int, num_classes: int) -> int:
    if not 0 <= index < num_classes:
        raise ValueError(
            f"class {index} is out of range: this model has {num_classes} classes, 0 to {num_classes - 1}"
        )
    return index
