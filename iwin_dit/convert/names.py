"""The tensors of an official file, and their names against those that a model expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from iwin_dit.models.official_names import PREFIX, WRAPPERS
from iwin_dit.runtime.errors import listed

M = TypeVar("M", bound=nn.Module)

# Parts of names that no official file has, and what they tell.
OTHERS = {
    "transformer_blocks.": "they are diffusers'; give the file that the model's authors published",
    ".down_blocks.": "they are those of an autoencoder of diffusers, which needs no import: give its folder",
    ".mixer.": "they are this package's own, which need no import: give the run or the pipeline",
}


def find_tensors(state_dict: Mapping[str, Any], others: Mapping[str, str] = OTHERS) -> dict[str, Tensor]:
    """Tensors by name, without the prefixes of DDP and torch.compile; of a training checkpoint, EMA first.

    Args:
        others: parts of names that tell of another kind of file, and what to do then.

    Raises:
        ValueError: where something else than a tensor is among them, or a key is no name; or where names
            are those of another kind of file, which is well known.
    """
    wrapped = (state_dict[key] for key in WRAPPERS if isinstance(state_dict.get(key), Mapping))
    state_dict = next(wrapped, state_dict)
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"the state dict has the key {name!r}, expected names of tensors")
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"the state dict's {name} is {type(tensor).__name__}, expected a tensor; "
                f"give the weights alone, or under {' or '.join(WRAPPERS)}"
            )
    for part, words in others.items():
        if alike := [name for name in state_dict if part in name]:
            raise ValueError(f"the state dict has names such as {alike[0]:.80}: {words}")
    return {PREFIX.sub("", name): tensor for name, tensor in state_dict.items()}


def load(
    model: M,
    weights: Mapping[str, Tensor],
    official: Callable[[str], str],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> M:
    """Copies official weights in by name. Every name must be used, and none may be missing.

    Args:
        official: the official name of a tensor, by ours.
        shapes: by official name, of tensors that have other axes there.

    Returns:
        the model, in eval mode.

    Raises:
        ValueError: listing the names that are missing, that are unexpected or whose tensors have another
            shape, the first ten of each.
    """
    ours = model.state_dict()
    expected = {official(name): tuple(tensor.shape) for name, tensor in ours.items()} | dict(shapes or {})
    missing, unexpected = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"the state dict does not fit the model: missing {listed(missing) or 'none'}; "
            f"unexpected {listed(unexpected) or 'none'}"
        )
    found = {name: tuple(weights[name].shape) for name in expected}
    if odd := [
        f"{name} {found[name]} instead of {expected[name]}" for name in found if found[name] != expected[name]
    ]:
        raise ValueError(f"the state dict does not fit the model: {listed(odd)}")
    model.load_state_dict({name: weights[official(name)].reshape(like.shape) for name, like in ours.items()})
    return model.eval()
