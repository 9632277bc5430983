"""Loads IwinDiTPipeline from the installed package."""

try:
    from iwin_dit import IwinDiTPipeline
except ImportError as error:
    raise ImportError("this pipeline needs the package iwin-dit: pip install iwin-dit") from error

__all__ = ["IwinDiTPipeline"]
