"""Objectives, the diffusers schedulers that sample what they train, and guidance."""
