"""The ranges of a recipe's numbers, which stand beside its keys, and the words that another library reads.

What is beyond a range is a slip of the keyboard: it would not return, exhaust the machine, or end deep in a
library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import ConfigError

MAX_TOKENS = 2**24
MAX_BLOCKS = 1_000
MAX_OPTION = 1_000_000


T = TypeVar("T")
FREE = "free"
Free = Annotated[T, FREE]  # of a key that a resumed run may set anew, without being another run


class Rule(NamedTuple):
    """What the numbers of a key have to be, and how an error says it: ``Annotated[int, ABOVE_ZERO]``."""

    fits: Callable[[Sequence[float]], bool]
    words: str


def each(fits: Callable[[float], bool], words: str) -> Rule:
    """The same of every number."""
    return Rule(lambda numbers: all(map(fits, numbers)), words)


def at_most(most: float) -> Rule:
    """No more than so many, and no less than minus so many."""
    return each(lambda number: abs(number) <= most, f"at most {most:,}")


def ascending(low: float, high: float) -> Rule:
    """Two numbers, the lower one first."""
    return Rule(lambda n: low <= n[0] <= n[1] <= high, f"{low:g} <= low <= high <= {high:g}")


ABOVE_ZERO = each(lambda number: number > 0, "a number above 0")
ZERO_OR_MORE = each(lambda number: number >= 0, "0 or more")
BELOW_ONE = each(lambda number: 0 <= number < 1, "a number in [0, 1)")
OF_ANY = at_most(1e30)  # more is infinite in float32 soon
OF_SPECS = {  # of the rooms below, by the key
    "window_size": (at_most(limits.SIDE),),
    "kernel_size": (at_most(limits.KERNEL),),
    "logit_std": (ABOVE_ZERO, at_most(1e3)),
    "shift": (ABOVE_ZERO, at_most(1e3)),
    "cosine_weight": (ZERO_OR_MORE, at_most(1e6)),
    "base_weight": (ZERO_OR_MORE, at_most(1e6)),
}

Count = Annotated[int, ABOVE_ZERO, at_most(10**9)]
CountFromZero = Annotated[int, ZERO_OR_MORE, at_most(10**9)]  # 0 for none, or never
Images = Annotated[int, ABOVE_ZERO, at_most(10**7)]  # of a batch
Share = Annotated[float, BELOW_ONE]
Seed = Annotated[int, at_most(2**63 - 1)]


def keys_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a recipe, sections and with dots those in them, and what is said beside their types."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        yield prefix + name, getattr(hint, "__metadata__", OF_SPECS.get(name, ()))
        if is_dataclass(hint):
            yield from keys_of(hint, f"{prefix}{name}.")


def may_change(kind: type) -> frozenset[str]:
    """The keys that a resumed run may set anew; ``train.max_steps`` only under a constant learning rate."""
    return frozenset(key for key, found in keys_of(kind) if FREE in found)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Every number of a recipe, or of a section, is in the range that stands beside its key.

    Raises:
        ConfigError: naming the key.
    """
    for key, rules in keys_of(type(config)):
        value = attrgetter(key)(config)
        found = list(numbers(value))
        for rule in (*rules, OF_ANY):
            if isinstance(rule, Rule) and value is not None and not rule.fits(found):
                shown = list(value) if isinstance(value, tuple) else value
                raise ConfigError(f"{prefix}{key} is {shown}, expected {rule.words}")


def numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value, at any depth."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def check_options(options: dict[str, Any], key: str) -> None:
    """Arguments of a constructor of timm's that make it load nothing, and no more blocks than there are.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in options.items():
        if name in ("checkpoint_path", "cache_dir") or name.startswith("pretrained"):
            raise ConfigError(
                f"{key} has {name}, which makes timm load a file that this recipe does not vouch for; remove "
                "it, and give weights by init_from"
            )
        if any(abs(number) > MAX_OPTION for number in numbers(value)):
            raise ConfigError(f"{key} has {name} {value}, expected numbers of at most {MAX_OPTION:,}")
        if name in ("depth", "depths", "layers", "num_layers") and sum(numbers(value)) > MAX_BLOCKS:
            raise ConfigError(f"{key} has {name} {value}, expected at most {MAX_BLOCKS:,} blocks")


_RAND_AUGMENT = re.compile(
    r"rand(-(m([0-9]|10)|n[1-9]|p(0(\.[0-9]+)?|1(\.0+)?)|mstd[0-9]+(\.[0-9]+)?|mmax[1-9]|inc[01]|t(weights|3aw?)))*"
)


def check_rand_augment(words: str) -> None:
    """timm's words for RandAugment, or ``none``.

    Raises:
        ConfigError: where timm would not know them, or Pillow would refuse what they ask for.
    """
    if words == "none":
        return
    if words.startswith("rand") and "mmax" not in words:
        raise ConfigError(
            f"augment.rand_augment {words} may reach magnitude 10, where Pillow refuses to posterize; "
            "add -mmax9"
        )
    if not _RAND_AUGMENT.fullmatch(words):
        raise ConfigError(
            f"augment.rand_augment is {words}, expected none or timm's words for RandAugment, such as "
            "rand-m9-mstd0.5-inc1-mmax9 (m magnitude to 10, n 1 to 9 operations, p probability, mstd, mmax 1 "
            "to 9, inc 0 or 1, tweights)"
        )
