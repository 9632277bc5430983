"""Pipeline folders that diffusers loads, with this package or, given trust in their code, through it.

Beside what ``save_pretrained`` writes lie two files of a few lines, ``pipeline.py`` and
``transformer/iwin_dit.py``, that import the installed package. They serve
``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.runtime import files

LOADER = '''"""Loads {name} from the installed package."""

try:
    from iwin_dit import {name}
except ImportError as error:
    raise ImportError("this pipeline needs the package iwin-dit: pip install iwin-dit") from error

__all__ = ["{name}"]
'''


def export_pipeline(pipeline: ClassConditionalPipeline, folder: Path, recipe: dict[str, Any]) -> None:
    """Writes the pipeline and its recipe to ``folder``, replaced as a whole once the new one is complete."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)

    index = temporary / "model_index.json"
    config = json.loads(index.read_text())
    name, model = type(pipeline).__name__, type(pipeline.transformer).__name__
    config["_class_name"] = ["pipeline", name]
    config.pop("_name_or_path", None)
    index.write_bytes(files.to_json(config))
    (temporary / "pipeline.py").write_text(LOADER.format(name=name))
    (temporary / "transformer" / "iwin_dit.py").write_text(LOADER.format(name=model))
    (temporary / "recipe.json").write_bytes(files.to_json(recipe))

    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    files.publish(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
