"""Loads IwinDiTTransformer2DModel from the installed package."""

try:
    from iwin_dit import IwinDiTTransformer2DModel
except ImportError as error:
    raise ImportError("this pipeline needs the package iwin-dit: pip install iwin-dit") from error

__all__ = ["IwinDiTTransformer2DModel"]
