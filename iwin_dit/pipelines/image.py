"""The image pipeline: class labels in, images out.

Legend: B images, C latent channels, h and w sides of the latent.
"""

from collections.abc import Callable

import torch
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline


class IwinDiTPipeline(ClassConditionalPipeline):
    """Samples images from an :class:`~iwin_dit.IwinDiTTransformer2DModel`.

    Its parts are those of :class:`~iwin_dit.pipelines.base.ClassConditionalPipeline`.
    """

    image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the signature that diffusers expects
        guide: IwinDiTTransformer2DModel | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws one image per label.

        Args:
            class_labels: ids or names, one or several, mixed as you like.
            guidance_scale: 1 is unguided and takes one forward pass a step instead of two.
            num_inference_steps: steps of the sampler.
            guidance_interval: (low, high) of t in [0, 1], with t = 1 noise, in which guidance acts.
            guidance_channels: guide only the first so many latent channels; 3 reproduces DiT's, SiT's and
                LightningDiT's published figures.
            height, width: of the images in pixels. Default: what the model was made for.
            generator: one, or one per image; image k then depends on its own generator alone.
            latents: initial noise ``(B, C, h, w)`` instead of drawing it.
            output_type: ``pil``; ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) in [0, 1]; normalised ``latent``.
            return_dict: an ``ImagePipelineOutput`` rather than a tuple.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": ...})``; returns
                such a dictionary, perhaps with new latents.
            guide: a smaller or less trained transformer of the same latents and classes, away from which
                predictions are pushed instead of from those without a class: autoguidance (Karras et al.
                2024). No null label is needed.

        Raises:
            ValueError: for labels, sizes, schedulers, guidance or a guide that do not fit the model.
        """
        latents = self._denoise(
            class_labels,
            self._sides(height, width),
            guidance_scale,
            num_inference_steps,
            guidance_interval,
            guidance_channels,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            guide,
        )
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
