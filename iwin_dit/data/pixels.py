"""Training straight from images: they are decoded here, and encoded by the VAE in the training step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iwin_dit.data.codec import spatial_factor, vae_statistics, weights_sha256
from iwin_dit.data.images import BadImage, center_crop, decode_image, random_crop
from iwin_dit.runtime.errors import DataError


class PixelDataset(Dataset):
    """``dataset[i] -> (pixels (3, H, W) uint8, label)``, with what training asks of a set of latents.

    Args:
        source: of encoded images, see :mod:`iwin_dit.data.sources`.
        vae: the autoencoder that will encode them; only its config and weights' hash are kept.
        vae_name: where it came from: a preset, a folder, a file or a hub id.
        latent_size: height and width of the latents that the model takes.
        crop: ``center``, or ``random``: another one each time an image is seen.
    """

    def __init__(self, source: Any, vae: Any, vae_name: str, latent_size: tuple[int, int], crop: str):
        self.source, self.crop = source, crop
        self.vae_name = self.vae_path = vae_name
        self.class_names: list[str] = source.class_names
        self.size = tuple(side * spatial_factor(vae) for side in latent_size)
        self.latent_shape: tuple[int, ...] = (vae.config.latent_channels, *latent_size)
        self.mean, self.std = vae_statistics(vae)
        self.vae_sha256 = weights_sha256(vae)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels, labels = self.draw([i], [False], [torch.Generator()])
        return pixels[0], labels[0]

    def draw(
        self, indices: Sequence[int], mirrored: Sequence[bool], rngs: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """For training: pixels ``(B, 3, H, W)`` uint8, and labels.

        Raises:
            DataError: naming an image that cannot be decoded.
        """
        images, labels = zip(*(self._read(i, rng) for i, rng in zip(indices, rngs, strict=True)), strict=True)
        flipped = [x.flip(-1) if flip else x for x, flip in zip(images, mirrored, strict=True)]
        return torch.stack(flipped), list(labels)

    def _read(self, i: int, rng: torch.Generator) -> tuple[Tensor, int]:
        name = self.source.name(i)
        try:
            data, label = self.source.read(i)
            image = decode_image(data, name)
            if self.crop == "center":
                return center_crop(image, *self.size), label
            return random_crop(image, *self.size, rng), label
        except BadImage as error:
            raise DataError(str(error) if name in str(error) else f"{name}: {error}") from None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes these images the same to a run that is resumed."""
        names = "\n".join(self.source.name(i).rpartition("/")[2] for i in range(len(self)))
        return {
            "vae_sha256": self.vae_sha256,
            "latent_shape": list(self.latent_shape),
            "images": len(self),
            "classes": self.class_names,
            "names_sha256": hashlib.sha256(names.encode(errors="replace")).hexdigest(),
        }
