"""The autoencoder of models of pixels, which does nothing: what is trained, sampled and saved needs one.

Legend: B images, H and W pixels.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor

IDENTITY = "none"  # what a recipe and a command call it


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """Pixels are their own latents: ``data.vae none``, for training on pixels (JiT, arXiv 2511.13720).

    Args:
        latent_channels: red, green and blue.

    Raises:
        ValueError: where there are other channels.
    """

    spatial_compression_ratio = 1

    @register_to_config
    def __init__(self, latent_channels: int = 3):
        super().__init__()
        if latent_channels != 3:
            raise ValueError(
                f"latent_channels is {latent_channels}, expected 3: pixels are red, green and blue"
            )
        # diffusers asks a model's tensors for its device and dtype, and saves no file where there are none
        self.register_buffer("one", torch.ones(1))

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """The pixels ``(B, 3, H, W)`` in [-1, 1], as they are."""
        return EncoderOutput(latent=x) if return_dict else (x,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The latents ``(B, 3, H, W)``, as they are.

        Raises:
            ValueError: where they are of other channels, and so no pixels.
        """
        if z.shape[1] != self.config.latent_channels:
            raise ValueError(f"the latents have {z.shape[1]} channels, expected the 3 of pixels")
        return DecoderOutput(sample=z) if return_dict else (z,)


IdentityAutoencoder.__module__ = "iwin_dit"  # saved pipelines name the package, not this file
