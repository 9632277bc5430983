"""Folders for intermediate files. They are marked when they are made; only marked ones are ever removed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.progress import say

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


def beside(path: Path) -> Path:
    """Where the intermediate files of an output belong: ``.NAME.work``, on the same file system."""
    return path.with_name(f".{path.name}.work")


@contextlib.contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, which then takes the place of ``folder`` in one step.

    What was there before is removed when the new folder is complete and on disk. If it holds a file that the
    new folder does not have, somebody else may have put it there: then it is kept as ``NAME.before``.

    Raises:
        ConfigError: where the place of the hidden folder is taken by something that was not made here.
        OSError: where it cannot be written.
    """
    work = beside(folder)
    remove(make(work))  # which a killed process may have left half full
    new = make(work) / folder.name
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                files.fsync(path)
        if os.path.lexists(folder):
            old, made = ({path.relative_to(root) for path in root.rglob("*")} for root in (folder, new))
            before = work / "before"
            if not (folder.is_dir() and old <= made):
                names = (folder.with_name(f"{folder.name}.before{number or ''}") for number in range(1000))
                before = next(name for name in names if not os.path.lexists(name))
                say(f"the folder that was there holds other files too and is kept as {before}")
            os.rename(folder, before)
        files.publish(new, folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(folder)) from error
    finally:  # after an error, too: a full disk should not stay full
        remove(work)


def is_ours(folder: Path) -> bool:
    """Whether :func:`make` made this folder."""
    return not folder.is_symlink() and (folder / MARKER).is_file()
