"""Stopping at a step boundary: the first signal asks, a second SIGTERM or Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from iwin_dit.runtime.progress import say

AT_ONCE = (signal.SIGTERM, signal.SIGINT)  # the second of these is not waited for
# A closed terminal, and what schedulers send before a time limit, such as Slurm's --signal=USR1. They may
# come twice: a launcher passes on the SIGHUP that the terminal has sent to everybody.
ASKING = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class StopRequest:
    """Truthy once one of these signals has arrived; as a context, it gives them back to whom they belonged.

    A second SIGTERM or SIGINT is handled as it was before. A signal that was ignored stays ignored, as SIGHUP
    is under ``nohup``. Python handles signals in the main thread alone: elsewhere nothing is installed, which
    one line says.
    """

    def __init__(self) -> None:
        self._received = False
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            say("training does not run in the main thread: no signal stops it at a step with a checkpoint")
            return
        for number in (*AT_ONCE, *ASKING):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        for once in AT_ONCE:
            if once in self._before:
                signal.signal(once, self._before[once])

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._received
