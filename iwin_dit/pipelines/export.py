"""The pipeline folder of a run: replaced as a whole, its recipe beside what diffusers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.runtime import files, scratch


def export_pipeline(pipeline: ClassConditionalPipeline, folder: Path, recipe: dict[str, Any]) -> None:
    """Writes the pipeline and its recipe to ``folder``, replaced as a whole once the new one is complete."""
    with scratch.replacement(folder) as new:
        pipeline.save_pretrained(new, safe_serialization=True)
        (new / "recipe.json").write_bytes(files.to_json(recipe))
