"""Valid inputs made wrong, and a loop that reads thousands of them.

An input is a function of its subject and its number alone, so a failing one is made again by ``again``.
``FUZZ=full`` reads all of them (``make fuzz``), without it a few hundred are read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iwin_dit.runtime.errors import UserError

FULL = os.environ.get("FUZZ") == "full"
SECONDS = 5  # of the processor, for one input
MAX_MEMORY = int(1.5e9)
SHOWN = 12

NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**40]
FLOATS = [0.5, -0.5, 1.5, 1e-9, 1e-320, 1e30, 1e300, -1e300, float("inf"), float("-inf"), float("nan")]
WORDS = """abc
    1 1e-4 null none auto all true ~ / .. ../.. a/b $HOME ² - B/2 XL/0 S/² %s%n{0} 1:30 .nan hf: hf:a/b
    iwin: i3d:x dinov2: file:///etc/passwd rand-m9-mmax9 rand-q9 2001-99-99"""
TEXTS = [*WORDS.split(), "", " ", "\x00", "a\nb", "é漢\u202e", "\ud800", "a" * 300]
LISTS = [[], [1], [1, 2], [1, 2, 3], [None], ["a"], [[1]], [0.9, 0.9], [2, 2], [True], [-1, 0], [10**12, 1]]
DICTS = [
    {},
    {"a": 1},
    {"name": "iwin"},
    {"": None},
    {"__class__": "x"},
    {"depths": [2, 2]},
    {"pretrained": "x"},
]
ODD = [None, True, False, *NUMBERS, *FLOATS, *TEXTS, *LISTS, *DICTS]


class Hang(BaseException):
    """An input that takes longer than :data:`SECONDS`; no ``except Exception`` may keep it."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """At most so much time of the processor, and twelve times as much of the clock, for what waits."""

    def stop(*_: Any) -> None:
        raise Hang

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def again(subject: str, number: int) -> random.Random:
    """The generator of one input."""
    return random.Random(f"{subject} {number}")


def fuzz(subject: str, read: Callable[[random.Random], Any], full: int, short: int) -> Counter[str]:
    """Reads inputs 0, 1, ... and fails if any ends otherwise than well or by a UserError of one line.

    Args:
        subject: the first part of every seed.
        read: makes an input from a generator and reads it; what it returns is counted, as a word.
        full: inputs of ``make fuzz``; short: of ``make test``.
    """
    ends, failures = Counter(), {}
    memory, began = peak(), time.perf_counter()
    count = full if FULL else short
    for number in range(count):
        try:
            with limited():
                ends[str(read(again(subject, number)))] += 1
        except UserError as error:
            ends["refused"] += 1
            if "Traceback" in str(error) or len(str(error)) > 3000:
                failures.setdefault(f"message of {len(str(error))} characters", []).append(number)
        except (Exception, Hang) as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if "iwin_dit" in f.filename] or where
            place = f"{ours[-1].filename.rpartition('iwin_dit/')[2]}:{ours[-1].lineno}"
            failures.setdefault(f"{type(error).__name__} {str(error)[:80]!r} at {place}", []).append(number)
    took = time.perf_counter() - began
    used = peak()
    print(f"\n{subject}: {count} inputs in {took:.0f} s, {dict(ends)}, memory at most {used / 1e9:.2f} GB")
    if failures:
        lines = [
            f"{len(numbers)} x {what}, such as number {numbers[:5]}" for what, numbers in failures.items()
        ]
        pytest.fail(f"{subject}:\n" + "\n".join(sorted(lines, reverse=True)[:SHOWN]), pytrace=False)
    assert used < MAX_MEMORY or used == memory, f"{subject}: {used / 1e9:.2f} GB of memory"
    return ends


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four of: bits flipped, bytes set, cut, removed, doubled, inserted."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 600))
        what = rng.randrange(8)
        if what == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1 and data:
            data[min(place, len(data) - 1)] = rng.randrange(256)
        elif what == 2:
            data[place : place + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, rng.choice(("little", "big")))
        elif what == 3:
            del data[place:]
        elif what == 4:
            del data[place : place + length]
        elif what == 5:
            other = rng.randrange(len(data) + 1)
            data[place:place] = data[other : other + length]
        elif what == 6:
            data[place : place + length] = bytes([rng.choice((0, 255, 32, 48))]) * length
        else:
            data[place:place] = rng.randbytes(min(length, 8))
    return bytes(data)


def mutate_text(rng: random.Random, text: str, pieces: list[str]) -> str:
    """One to four of: a piece put in, characters removed, replaced or doubled, the rest cut."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, what = rng.randrange(len(text) + 1), rng.randrange(20)
        if what < 9:
            text = text[:place] + rng.choice(pieces) + text[place:]
        elif what < 12:
            text = text[:place] + text[place + rng.choice((1, 2, 10)) :]
        elif what < 15:
            letter = chr(rng.randrange(rng.choice((128, 0x250, 0x10000))))
            text = text[:place] + letter + text[place + 1 :]
        elif what < 18:
            other = rng.randrange(len(text) + 1)
            text = text[:place] + text[other : other + 40] + text[place:]
        else:
            text = text[:place]
    return text


def mutate_json(rng: random.Random, value: Any) -> Any:
    """One to three of: a value of another type or size, a key removed, renamed or added, a value doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holders = list(_holders(value))
        if not holders:
            return copy.deepcopy(rng.choice(ODD))
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        what = rng.randrange(10)
        if what < 6:
            holder[key] = _other(rng, holder[key])
        elif what == 6:
            del holder[key]
        elif what == 7 and isinstance(holder, dict):
            holder[rng.choice((f"{key}s", "", f" {key}", "__proto__"))] = holder.pop(key)
        elif what == 8 and isinstance(holder, list):
            holder[key:key] = [holder[key]] * rng.choice((1, 2, 50))
        elif rng.random() < 0.02:
            return copy.deepcopy(rng.choice(ODD))
        else:
            holder[key] = nested(rng.choice((1, 3, 40, 90)), holder[key])
    return value


def _other(rng: random.Random, value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(
            (value + 1, value - 1, -value, 2 * value, str(value), float(value), [value], *NUMBERS)
        )
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice(
            (value[:-1], value + value, value.upper(), f"../{value}", f"/{value}", f"{value}\x00")
        )
    return copy.deepcopy(rng.choice(ODD))


def nested(depth: int, value: Any) -> Any:
    """Lists around a value."""
    for _ in range(depth):
        value = [value]
    return value


def _holders(value: Any) -> Iterator[Any]:
    """All dictionaries and lists that are not empty."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holders(item)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A header that lies, or bytes as of :func:`mutate_bytes`, mostly near the header."""
    length = int.from_bytes(data[:8], "little")
    what = rng.randrange(10)
    if what < 5:
        header = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + length]))).encode()
        claimed = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
        return claimed.to_bytes(8, "little") + header + data[8 + length :]
    if what < 7:
        return mutate_bytes(rng, data[: 8 + length]) + data[8 + length :]
    if what == 7:
        return (100_000).to_bytes(8, "little") + b"[" * 100_000
    return mutate_bytes(rng, data)


def mutate_json_text(rng: random.Random, data: bytes) -> bytes:
    """JSON with other values, or text that is none."""
    what = rng.randrange(20)
    if what < 13:
        return json.dumps(mutate_json(rng, json.loads(data))).encode()
    if what < 18:
        return mutate_bytes(rng, data)
    return rng.choice(
        (b"", b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b"{}", b"1" * 5000, b'{"a": NaN}', b"{}" * 2)
    )
