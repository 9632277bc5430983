"""Networks on the layers: the diffusion transformer."""
