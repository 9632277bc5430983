"""The pipeline folder of a run: replaced as a whole, its recipe beside what diffusers writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.runtime import files


def export_pipeline(pipeline: ClassConditionalPipeline, folder: Path, recipe: dict[str, Any]) -> None:
    """Writes the pipeline and its recipe to ``folder``, replaced as a whole once the new one is complete."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    (temporary / "recipe.json").write_bytes(files.to_json(recipe))

    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    files.publish(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
