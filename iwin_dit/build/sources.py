"""Where locations of images and clips become sources, whose classes are questioned before work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwin_dit.data.classes import check_classes
from iwin_dit.data.clip_sources import ClipFolderSource
from iwin_dit.data.sources import Source, open_source
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.errors import DataError

COLUMNS = ("split", "image_column", "label_column")


def open_images(
    location: str, options: Any, are_clips: bool = False, begun: list[str] | None = None
) -> Source | ClipFolderSource:
    """The source at a location.

    Args:
        options: arguments or a section of a recipe, with ``labels``, ``follow_links``, ``allow_odd_classes``
            and what chooses among Hugging Face data.
        are_clips: it holds videos.
        begun: the classes of what goes on here, which were accepted when it began, in their order.

    Raises:
        DataError: where it is missing, or its classes are hardly what was meant.
    """
    columns = {name: getattr(options, name) for name in COLUMNS}
    if are_clips:
        if given := [name for name, value in columns.items() if value is not None]:
            raise DataError(f"{given[0]} is for Hugging Face data; clips lie in class folders: leave it out")
        source: Source | ClipFolderSource = ClipFolderSource(location, options.follow_links, begun)
    else:
        source = open_source(location, options.labels, options.follow_links, begun, **columns)
    if not options.allow_odd_classes and source.class_names != begun:
        check_classes(source, location)
    return source


def classes_begun(path: Path, key: str) -> list[str] | None:
    """The classes that a run or an extraction wrote down when it began; None where there is no such list."""
    try:
        found = files.read_json(path, limits.INDEX_BYTES)[key]
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads the rest of it says what is wrong
        return None
    is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return found if is_list else None
