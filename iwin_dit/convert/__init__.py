"""Importers of official checkpoints: ``(state_dict, config) -> model``.

The config is the official constructor's arguments.
"""

from iwin_dit.convert.iwin_transformer import from_iwin_transformer
from iwin_dit.convert.ldm_vae import from_ldm_vae
from iwin_dit.convert.official_files import load_official
from iwin_dit.convert.transformers import from_dit, from_flashdit, from_lightningdit

__all__ = [
    "from_dit",
    "from_flashdit",
    "from_iwin_transformer",
    "from_ldm_vae",
    "from_lightningdit",
    "load_official",
]
