"""Networks on the layers: the diffusion transformer, and the Iwin Transformer under its names in timm."""

from iwin_dit.models import iwin_transformer as _registered  # noqa: F401
