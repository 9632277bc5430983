"""Several processes at one task."""

from __future__ import annotations

from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs

# How long processes wait for each other. The first one lists a million files, prepares data, looks at all
# images or computes figures while the others wait. PyTorch's own 10 minutes (NCCL) or 30 (gloo) are too few.
# This is for one that hangs: of one that dies its launcher knows at once.
WAIT = timedelta(days=1)
TRAINING_WAIT = timedelta(hours=2)  # where it saves, verifies and draws, and a hang costs all devices


def group_timeout(wait: timedelta = WAIT) -> InitProcessGroupKwargs:
    """What an :class:`accelerate.Accelerator` takes, in every program of ours."""
    return InitProcessGroupKwargs(timeout=wait)
