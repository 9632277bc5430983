"""The recipes that come with the package, which a command finds by their names wherever one is."""

from __future__ import annotations

import difflib
from pathlib import Path

from iwin_dit.runtime.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "configs"  # in a checkout a link to the folder beside the package


def find_recipe(name: str | Path, folder: str = "") -> Path:
    """The file of ``--config``: a path, or a recipe of the package such as ``quickstart``, ``compare/iwin``.

    Args:
        folder: of the package's recipes, where a name is looked for, too.

    Raises:
        ConfigError: for a name without an ending that is neither; with the nearest name.
    """
    path = Path(name)
    if path.suffix or path.is_file() or "\0" in str(name):
        return path
    for place in (RECIPES, RECIPES / folder):
        if (found := place / f"{name}.yaml").is_file():
            return found
    known = [str(found.relative_to(RECIPES).with_suffix("")) for found in sorted(RECIPES.rglob("*.yaml"))]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--config {name} is neither a file nor a recipe that comes with iwin-dit{hint}")
