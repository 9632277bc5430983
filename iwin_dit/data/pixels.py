"""Pixels that extraction and training take: decoded and cropped here, encoded by the VAE afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iwin_dit.data.codec import latent_channels, latent_frames, spatial_factor, vae_statistics, weights_sha256
from iwin_dit.data.images import TRANSPARENT, BadImage, center_crop, decode_image, random_crop
from iwin_dit.data.sources import identity_of
from iwin_dit.data.video import ClipSpec, choose_clip
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.progress import say


class Pixels(NamedTuple):
    """An image ``(3, H, W)`` or a clip ``(3, T, H, W)``, uint8, its label, and whether it was transparent."""

    pixels: Tensor
    label: int
    is_transparent: bool
    sha256: str = ""  # of the image's file, where it was asked for


@dataclass(frozen=True)
class Reader:
    """Images or clips of a source, decoded and cropped: ``reader.read(i, rng) -> Pixels``.

    Args:
        source: of images (:mod:`iwin_dit.data.sources`), or of videos where there is a ``clip``.
        size: height and width.
        crop: ``center`` is the ADM centre crop of the published FIDs; ``random`` a random one.
        clip: frames and stride of a clip, which is taken from a random place of its video.
        clips_per_video: each video stands there so many times.
        background: what shows through transparent pixels; see :func:`iwin_dit.data.images.decode_image`.
        hashed: images come with the hash of their files.
    """

    source: Any
    size: tuple[int, int]
    crop: str = "center"
    clip: ClipSpec | None = None
    clips_per_video: int = 1
    background: Colour | None = None
    hashed: bool = False

    def __len__(self) -> int:
        return len(self.source) * self.clips_per_video

    def read(self, i: int, rng: torch.Generator) -> Pixels:
        """Places of clips and random crops are drawn from ``rng``.

        Raises:
            BadImage: naming what cannot be decoded, or a video that is shorter than the clip.
        """
        number = i // self.clips_per_video
        name, sha256 = self.source.name(number), ""
        try:
            if self.clip is None:
                data, label = self.source.read(number)
                frames = [decode_image(data, name, background=self.background)]
                sha256 = hashlib.sha256(data).hexdigest() if self.hashed else ""
            else:
                frames = choose_clip(self.source.path(number), self.clip, rng, self.background)
                label = self.source.labels[number]
            crop = center_crop if self.crop == "center" else partial(random_crop, rng=rng)
            cropped, state = [], rng.get_state()
            for frame in frames:
                rng.set_state(state)  # the same crop for every frame
                cropped.append(crop(frame, *self.size))
        except BadImage as error:
            raise BadImage(str(error) if name in str(error) else f"{name}: {error}") from None
        pixels = cropped[0] if self.clip is None else torch.stack(cropped, 1)
        return Pixels(pixels, label, any(frame.info.get(TRANSPARENT) for frame in frames), sha256)


class PixelDataset(Dataset):
    """``dataset[i] -> (pixels (3, [T,] H, W) uint8, label)``, with what training asks of a set of latents.

    Args:
        reader: of images, or clips, of the size that the autoencoder makes latents of the model's of.
        vae: the autoencoder that will encode them; only its config and weights' hash are kept.
        vae_path: where it came from: a preset, a folder, a file or a hub id.
        max_bad_images: so many images that cannot be decoded are left out: the next one in the source takes
            the place of each. Every process that reads counts those that it meets.
    """

    def __init__(self, reader: Reader, vae: Any, vae_path: str, max_bad_images: int = 0):
        self.reader, self.max_bad_images = reader, max_bad_images
        self._bad: set[int] = set()
        self.vae_path = vae_path
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
                self._bad.add(number)
                if len(self._bad) > self.max_bad_images:
                    raise DataError(
                        f"{error}; or go on without it by data.max_bad_images {len(self._bad)} or more: the "
                        "next image takes its place"
                    ) from None
                say(f"left out: {error}")
        raise DataError("no image can be decoded")

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
