"""The pipelines of images and of clips: class labels in, images or clips out."""

from dataclasses import dataclass
from typing import Any

from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
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


@dataclass
class IwinDiTVideoPipelineOutput(BaseOutput):
    """Clips, as the call's ``output_type`` says."""

    frames: Any


class IwinDiTVideoPipeline(ClassConditionalPipeline):
    """Samples clips from an :class:`~iwin_dit.IwinDiTTransformer3DModel`.

    Its parts and its call are those of :class:`~iwin_dit.pipelines.base.ClassConditionalPipeline`; an
    autoencoder of images decodes frame by frame.
    """

    video_processor = VideoProcessor()
    output = IwinDiTVideoPipelineOutput

    def _postprocess(self, pixels: Tensor, output_type: str) -> Any:
        return self.video_processor.postprocess_video(pixels, output_type=output_type)
