"""Progress bars that are lively on a terminal and brief in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar; where nobody watches, one line in ten seconds instead of ten in one."""
    watched = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(*args, mininterval=0.1 if watched else 10.0, dynamic_ncols=watched, **options)
