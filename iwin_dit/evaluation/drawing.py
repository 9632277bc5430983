"""How an evaluation draws the images that it measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.parts import draw_in_parts
from iwin_dit.runtime.errors import ConfigError, DataError


def drawer(
    pipeline: ClassConditionalPipeline, options: dict[str, Any]
) -> Callable[[list[int], list[torch.Generator]], Tensor]:
    """``draw(labels, generators)``: uint8 images ``(B, 3, H, W)``, or clips ``(B, 3, T, H, W)``.

    They are rounded as saving a PNG rounds them. A batch that does not fit into memory is drawn in parts.

    Raises, when called:
        ConfigError: where the pipeline refuses the options.
        DataError: where the model draws what is not finite.
    """

    def draw(labels: list[int], generators: list[torch.Generator]) -> Tensor:
        try:
            (images,) = pipeline(labels, generator=generators, output_type="pt", return_dict=False, **options)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if images.ndim == 5:  # (B, T, 3, H, W)
            images = images.transpose(1, 2)
        if not torch.isfinite(images).all():
            raise DataError("the model draws images that are not finite; its weights are not usable")
        return (images.float() * 255).round().to(torch.uint8)

    return lambda labels, generators: torch.cat(draw_in_parts(draw, labels, generators))
