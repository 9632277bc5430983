"""Official files, read so that no code in them can run, and their tensors under the names of ours.

Training checkpoints hold numbers of NumPy beside their tensors. NumPy's own functions trust what they are
given when they restore them, so stand-ins restore them here: plain numbers, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from iwin_dit.models.official_names import PREFIX, WRAPPERS
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError, listed

M = TypeVar("M", bound=nn.Module)

FORMATS = {  # of struct, by NumPy's names of numbers
    **{"f8": "d", "f4": "f", "f2": "e", "b1": "?"},
    **{"i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B"},
}
FOREIGN = re.compile(r"Unsupported global: GLOBAL (\S+) was not|but got (?:<class ')?([\w.]+)")
# Parts of names that no official file has, and what they tell.
OTHERS = {
    "transformer_blocks.": "they are diffusers'; give the file that the model's authors published",
    ".down_blocks.": "they are those of an autoencoder of diffusers, which needs no import: give its folder",
    ".mixer.": "they are this package's own, which need no import: give the run or the pipeline",
}


class _Kind:
    """Stands for ``numpy.dtype``, of one number."""

    def __init__(self, name: str, *_: bool):
        if name not in FORMATS:
            raise TypeError(f"Unsupported global: GLOBAL numpy.dtype({name!r:.40}) was not")
        self.format, self.order = FORMATS[name], "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {">": ">", "<": "<"}.get(state[1], "=")


def _number(kind: _Kind, data: bytes) -> float | int | bool:
    """Stands for ``numpy.core.multiarray.scalar``."""
    return struct.unpack(kind.order + kind.format, data)[0]


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,  # DiT's training checkpoints carry their arguments
    (_Kind, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def load_official(path: str | Path) -> Mapping[str, Any]:
    """Reads an official ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file.

    Raises:
        DataError: where it cannot be read so, with the cause.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds for what they do not accept
        raise DataError(f"{path} cannot be read as tensors: {_cause(path, error)}") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds {type(content).__name__}, expected tensors by name")
    return content


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, OSError | SafetensorError):
        return files.why_unreadable(path, error)
    if foreign := FOREIGN.search(str(error)):
        return (
            f"beside tensors it holds {foreign[1] or foreign[2]}, and objects that could run code are not "
            "read; where you trust the file, save its state dict alone by torch.save or as safetensors"
        )
    damaged = ValueError("it is not what torch.save writes, or it is damaged; fetch it again")
    return files.why_unreadable(path, damaged)


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


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A name whose parts are replaced, in order."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


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
