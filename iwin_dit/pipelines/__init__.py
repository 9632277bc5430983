"""diffusers pipelines."""
