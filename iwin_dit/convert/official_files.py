"""Official files, read so that no code in them can run.

Training checkpoints hold numbers of NumPy beside their tensors. NumPy's own functions trust what they are
given when they restore them, so stand-ins restore them here: plain numbers, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError

FORMATS = {  # of struct, by NumPy's names of numbers
    **{"f8": "d", "f4": "f", "f2": "e", "b1": "?"},
    **{"i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B"},
}
FOREIGN = re.compile(r"Unsupported global: GLOBAL (\S+) was not|but got (?:<class ')?([\w.]+)")


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
