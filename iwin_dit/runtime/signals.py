"""Stopping at a step boundary: the first SIGTERM or Ctrl-C asks, the second stops at once."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Truthy once SIGTERM or SIGINT has arrived. A second one is handled as Python does by default."""

    def __init__(self) -> None:
        self._defaults = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        self._received = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        for s, default in self._defaults.items():
            signal.signal(s, default)

    def __bool__(self) -> bool:
        return self._received
