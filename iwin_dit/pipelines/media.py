"""The image pipeline: class labels in, images out."""

from typing import Any

from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from iwin_dit.pipelines.base import ClassConditionalPipeline


class IwinDiTPipeline(ClassConditionalPipeline):
    """Samples images from an :class:`~iwin_dit.IwinDiTTransformer2DModel`.

    Its parts and its call are those of :class:`~iwin_dit.pipelines.base.ClassConditionalPipeline`.
    """

    image_processor = VaeImageProcessor()
    output = ImagePipelineOutput

    def _postprocess(self, pixels: Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(pixels, output_type=output_type)
