"""The tensors of an official file, and their names against those that a model expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from iwin_dit.runtime.errors import listed

# Parts of names that no official file has, and what they tell.
OTHERS = {
    "transformer_blocks.": "they are diffusers'; give the file that the model's authors published",
    ".down_blocks.": "they are those of an autoencoder of diffusers, which needs no import: give its folder",
    ".mixer.": "they are this package's own, which need no import: give the run or the pipeline",
}


def find_tensors(
    state_dict: Mapping[str, Any], wrappers: Sequence[str], others: Mapping[str, str] = OTHERS
) -> Mapping[str, Tensor]:
    """Tensors by name: those under the first of the wrappers' keys that a training checkpoint has, or all.

    Args:
        others: parts of names that tell of another kind of file, and what to do then.

    Raises:
        ValueError: where something else than a tensor is among them, or a key is no name; or where names
            are those of another kind of file, which is well known.
    """
    state_dict = next(
        (state_dict[key] for key in wrappers if isinstance(state_dict.get(key), Mapping)), state_dict
    )
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"the state dict has the key {name!r}, expected names of tensors")
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"the state dict's {name} is {type(tensor).__name__}, expected a tensor; "
                f"give the weights alone, or under {' or '.join(wrappers)}"
            )
    for part, words in others.items():
        if alike := [name for name in state_dict if part in name]:
            raise ValueError(f"the state dict has names such as {alike[0]:.80}: {words}")
    return state_dict


def check_fit(expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> None:
    """Every official name must be used, none may be missing, and the shapes must agree.

    Args:
        expected: official names, and the shapes of their tensors.

    Raises:
        ValueError: listing the names that are missing, that are unexpected or whose tensors have another
            shape, the first ten of each.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"the state dict does not fit the config: missing {listed(missing) or 'none'}; "
            f"unexpected {listed(unexpected) or 'none'}"
        )
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if tuple(found[name].shape) != tuple(shape)
    ]
    if wrong:
        raise ValueError(f"the state dict does not fit the config: {listed(wrong)}")
