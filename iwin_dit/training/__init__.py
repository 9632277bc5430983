"""The training loop on Accelerate, and what it updates."""
