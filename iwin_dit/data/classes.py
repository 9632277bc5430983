"""Labels and classes of images: read strictly, and questioned where they are hardly what was meant."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torchvision.models._meta import _IMAGENET_CATEGORIES as IMAGENET_NAMES

from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import DataError, listed

MISSING = {"nan", "<na>", "n/a", "null"}  # what pandas and databases write for a label that is not there
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
ALLOW = "if that is meant, say so with --allow-odd-classes (in a recipe, data.allow_odd_classes true)"


def label_of(value: object, where: str) -> int:
    """A label from an integer or its text.

    Raises:
        DataError: where it is none, naming ``where``.
    """
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limits.CLASSES:
        raise DataError(
            f"{where}: found label {str(value)[:40]!r}, expected an integer from 0 to {limits.CLASSES - 1}"
        )
    return value


def classes_of(texts: Sequence[str | None], places: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names, and the class of each label that is given as a text.

    Labels that are all integers stay so, and the classes are ``0`` to the largest; otherwise they are class
    names, numbered in sorted order.

    Args:
        places: where each stands, such as ``line 2``, for errors.

    Raises:
        DataError: for labels that are missing, that have white space around them, or that are numbers with a
            point.
    """
    kinds = {
        "are missing": [i for i, text in enumerate(texts) if not text or text.lower() in MISSING],
        "have white space around them": [i for i, text in enumerate(texts) if text and text != text.strip()],
    }
    for what, found in kinds.items():
        if found:
            shown = listed([f"{places[i]}: {texts[i]!r}" for i in found], 5)
            raise DataError(f"labels {what} ({shown}); mend them or drop them")
    given = [text for text in texts if text]  # all of them
    if all(re.fullmatch(r"-?[0-9]+", text) for text in given):
        labels = [label_of(text, place) for text, place in zip(given, places, strict=True)]
        return names_of(labels, None, str), labels
    if all(re.fullmatch(r"-?[0-9]*\.?[0-9]+(e-?[0-9]+)?|-?[0-9]+\.", text.lower()) for text in given):
        i = next(i for i, text in enumerate(given) if not re.fullmatch(r"-?[0-9]+", text))
        raise DataError(
            f"the labels are numbers, but not whole ones ({places[i]}: {texts[i]!r}); write them as "
            "0, 1, ..., or write names"
        )
    names = sorted(set(given))
    number_of = {name: i for i, name in enumerate(names)}
    return names, [number_of[text] for text in given]


def names_of(
    labels: Sequence[int] | np.ndarray, named: Sequence[str] | None, place: Callable[[int], str]
) -> list[str]:
    """Class names of labels that are numbers: ``named``, or else ``0`` to the largest.

    Raises:
        DataError: where a label is beyond the names, with ``place(i)`` of the largest.
    """
    top = int(np.max(labels))
    if named and top >= len(named):
        where = place(int(np.argmax(labels)))
        raise DataError(f"{where}: found label {top}, but only {len(named)} classes are named")
    return list(named or map(str, range(top + 1)))


def in_order(folders: Sequence[str], where: str, known: Sequence[str] | None = None) -> list[str]:
    """Class folders in the order of their classes: of their numbers, where all are numbers, else sorted.

    Args:
        known: the order that a run or a set of latents was begun with, which stays where the folders do.

    Raises:
        DataError: where two have one number, such as 1 and 01.
    """
    if known is not None and sorted(known) == sorted(folders):
        return list(known)
    if not all(re.fullmatch(r"[0-9]+", name) for name in folders):
        return sorted(folders)
    ordered = sorted(folders, key=lambda name: (int(name), name))
    for one, two in itertools.pairwise(ordered):
        if int(one) == int(two):
            raise DataError(
                f"the class folders {one} and {two} of {where} are one number; rename one of them"
            )
    return ordered


def numbering_line(names: Sequence[str]) -> str | None:
    """A line that says which class is which, where their names are numbers, but not their own."""
    own = [str(i) for i in range(len(names))]
    if list(names) == own or not all(re.fullmatch(r"[0-9]+", name) for name in names):
        return None
    return f"classes are numbered from 0: class 0 is {names[0]}, class {len(names) - 1} is {names[-1]}"


def check_classes(source: Any, where: str) -> None:
    """Questions classes that are hardly what was meant, before hours of work on them.

    Raises:
        DataError: for a class without images, a single class, as many classes as images, class folders that
            are named as splits, or names that differ in case alone.
    """
    names = source.class_names
    if problem := _oddity(names, np.bincount(source.labels, minlength=len(names))):
        raise DataError(f"{where} {problem}; {ALLOW}")


def _oddity(names: Sequence[str], counts: np.ndarray) -> str | None:
    empty = [names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if empty == [names[0]] == ["0"]:
        return "has no image of class 0, which would be trained and drawn: write labels from 0, not from 1"
    if empty:
        return (
            f"has no images of {len(empty)} of {len(names)} classes, which would be trained and drawn: "
            f"{listed(empty)}; add images, or number the classes without gaps"
        )
    if {name.lower() for name in names} <= set(SPLITS):
        return f"has the classes {listed(names)}, which are names of splits; give the folder of one split"
    if len(names) == 1:
        return f"has a single class, {names[0]}; give the folder that holds the class folders"
    if len(names) == counts.sum():
        return f"has as many classes as images, {len(names)}; expected several images of each class"
    if list(names) != list(IMAGENET_NAMES):  # which has a cardigan and a dog called Cardigan
        same = defaultdict(list)
        for name in names:
            same[name.casefold()].append(name)
        if alike := [found for found in same.values() if len(set(found)) > 1]:
            return (
                f"has classes whose names differ in case alone: {listed(alike[0])}; make them one, or rename"
            )
    return None
