"""Training straight from images or videos: decoded here, encoded by the VAE in the training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iwin_dit.data.codec import (
    latent_channels,
    latent_frames,
    spatial_factor,
    vae_statistics,
    weights_sha256,
)
from iwin_dit.data.images import BadImage
from iwin_dit.data.reading import Pixels, Reader
from iwin_dit.data.sources import identity_of
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import say


class PixelDataset(Dataset):
    """``dataset[i] -> (pixels (3, [T,] H, W) uint8, label)``, with what training asks of a set of latents.

    Args:
        reader: of images, or clips, of the size that the autoencoder makes latents of the model's of.
        vae: the autoencoder that will encode them; only its config and weights' hash are kept.
        vae_name: where it came from: a preset, a folder, a file or a hub id.
        max_bad_images: so many images that cannot be decoded are left out: the next one in the source takes
            the place of each. Every process that reads counts those that it meets.
    """

    def __init__(self, reader: Reader, vae: Any, vae_name: str, max_bad_images: int = 0):
        self.reader, self.max_bad_images = reader, max_bad_images
        self._bad: set[int] = set()
        self.vae_name = self.vae_path = vae_name
        self.class_names: list[str] = reader.source.class_names
        frames = () if reader.clip is None else (latent_frames(vae, reader.clip.frames),)
        sides = (side // spatial_factor(vae) for side in reader.size)
        self.latent_shape: tuple[int, ...] = (latent_channels(vae), *frames, *sides)
        self.mean, self.std = vae_statistics(vae)
        self.vae_sha256 = weights_sha256(vae)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels, labels = self.draw([i], [False], [torch.Generator()])
        return pixels[0], labels[0]

    def draw(
        self, indices: Sequence[int], mirrored: Sequence[bool], rngs: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """For training: pixels ``(B, 3, [T,] H, W)`` uint8, and labels.

        Raises:
            DataError: naming an image that cannot be decoded, where no more may be left out.
        """
        read = [self._read(i, rng) for i, rng in zip(indices, rngs, strict=True)]
        pixels = [x.pixels.flip(-1) if flip else x.pixels for x, flip in zip(read, mirrored, strict=True)]
        return torch.stack(pixels), [x.label for x in read]

    def _read(self, i: int, rng: torch.Generator) -> Pixels:
        """Image ``i``, or the next that can be decoded: a function of ``i`` and ``rng`` alone."""
        state = rng.get_state()
        for number in range(i, i + len(self)):
            number %= len(self)
            if number in self._bad:
                continue
            rng.set_state(state)
            try:
                return self.reader.read(number, rng)
            except BadImage as error:
                self._leave_out(number, error)
        raise DataError("no image can be decoded")

    def _leave_out(self, number: int, error: BadImage) -> None:
        self._bad.add(number)
        if len(self._bad) > self.max_bad_images:
            raise DataError(
                f"{error}; or go on without it by data.max_bad_images {len(self._bad)} or more: the next "
                "image takes its place"
            ) from None
        say(f"left out: {error}")

    @property
    def identity(self) -> dict[str, Any]:
        """What makes these images the same to a run that is resumed."""
        clip = self.reader.clip
        return {
            "vae_sha256": self.vae_sha256,
            "latent_shape": list(self.latent_shape),
            **identity_of(self.reader.source),
            **({} if clip is None else {"frames": clip.frames, "frame_stride": clip.stride}),
        }
