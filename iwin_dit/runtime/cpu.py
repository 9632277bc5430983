"""What a process on a CPU needs to run at full speed."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(num_processes: int) -> None:
    """Shares the cores among the processes: ``accelerate launch`` gives each a single thread."""
    torch.set_num_threads(max(1, cores() // num_processes))


def keep_freed_memory() -> None:
    """Keeps freed memory in the process.

    glibc would map and unmap every large tensor, page fault by page fault; without that the quickstart trains
    1.7 times as fast. Where there is no glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
