"""Folders for intermediate files. They are marked when they are made; only marked ones are ever removed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError

MARKER = ".made-by-iwin-dit"


def make(folder: Path) -> Path:
    """Makes a folder for intermediate files, or takes the one that an earlier process made; returns it.

    It appears together with its mark, so that a kill leaves no folder that the next process refuses.

    Raises:
        ConfigError: where something is there that was not made here.
        OSError: where it cannot be written.
    """
    if not os.path.lexists(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
        (temporary / MARKER).touch()
        temporary.chmod(0o777 & ~files.umask())
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first
            files.remove_tree(temporary)
            if not is_ours(folder):
                raise
    if not is_ours(folder):
        raise ConfigError(
            f"{folder} is needed for intermediate files, but something is there that was not made for them; "
            "move it away, or choose another output"
        )
    return folder


def remove(folder: Path) -> None:
    """Removes a folder that :func:`make` made, and nothing else.

    It is renamed first, so that a kill does not leave half of it under its name.
    """
    if is_ours(folder):
        files.remove_tree(files.set_aside(folder))


def is_ours(folder: Path) -> bool:
    """Whether :func:`make` made this folder."""
    return not folder.is_symlink() and (folder / MARKER).is_file()
