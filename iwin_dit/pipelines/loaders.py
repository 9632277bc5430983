"""Small files in a saved pipeline, by which diffusers finds the classes of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIBRARY = "iwin_dit"
LOADER = '''"""Loads {name} from the installed package."""

try:
    from iwin_dit import {name}
except ImportError as error:
    raise ImportError("this pipeline needs the package iwin-dit: pip install iwin-dit") from error

__all__ = ["{name}"]
'''


def write_loaders(folder: Path, pipeline: str, index: Mapping[str, Any]) -> None:
    """Writes ``pipeline.py``, and an ``iwin_dit.py`` beside each component that is a class of ours.

    They serve ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.

    Args:
        pipeline: the name of its class.
        index: of ``model_index.json``: library and class by the name of the component.
    """
    (folder / "pipeline.py").write_text(LOADER.format(name=pipeline))
    for component in ("transformer", "vae", "scheduler"):
        library, kind = index[component]
        if library == LIBRARY:
            (folder / component).mkdir(exist_ok=True)
            (folder / component / f"{LIBRARY}.py").write_text(LOADER.format(name=kind))
