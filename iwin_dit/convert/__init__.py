"""Importers of official checkpoints: ``(state_dict, config) -> model``; config is the official constructor's
arguments.
"""

from iwin_dit.convert.transformers import from_dit, from_flashdit, from_lightningdit, load_official

__all__ = ["from_dit", "from_flashdit", "from_lightningdit", "load_official"]
