"""Drawing a batch that may not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from iwin_dit.pipelines.sampling import is_out_of_memory

T = TypeVar("T")
L = TypeVar("L")


def draw_in_parts(
    draw: Callable[[list[L], list[torch.Generator]], T],
    labels: list[L],
    generators: list[torch.Generator],
) -> list[T]:
    """``[draw(labels, generators)]``; or, where this runs out of memory, of the first and of the second half.

    Halves that do not fit either are halved again. The generators begin each time where they were, so that
    the images are the same but for the rounding that depends on the batch.

    Raises:
        Exception: where not even one fits, as it was raised.
    """
    states = [generator.get_state() for generator in generators]
    try:
        return [draw(labels, generators)]
    except Exception as error:
        if len(labels) == 1 or not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)  # after the error, which held what was drawn so far
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    half = len(labels) // 2
    return [
        *draw_in_parts(draw, labels[:half], generators[:half]),
        *draw_in_parts(draw, labels[half:], generators[half:]),
    ]
