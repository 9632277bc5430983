"""Randomness as an argument: every random number is a function of a seed and of what it is for."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """63 bits from a seed and the names and numbers of its use, as in ``derive_seed(0, "order", epoch)``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for this use: the numbers do not depend on the device or on other draws."""
    return torch.Generator().manual_seed(derive_seed(*parts))
