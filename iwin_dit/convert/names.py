"""The names in a state dict, against those that a model expects."""

from __future__ import annotations

from collections.abc import Collection


def check_names(expected: Collection[str], found: Collection[str]) -> None:
    """Every official name must be used, and none may be missing.

    Raises:
        ValueError: listing the names that are missing and those that are unexpected.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"the state dict does not fit the config: missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(unexpected) or 'none'}"
        )
