"""Images and clips of a source, decoded and cropped, as extraction and training take them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iwin_dit.data.images import TRANSPARENT, BadImage, center_crop, decode_image, random_crop
from iwin_dit.data.video import BadClip, ClipSpec
from iwin_dit.runtime.colours import Colour


class Pixels(NamedTuple):
    """An image ``(3, H, W)`` or a clip ``(3, T, H, W)``, uint8, its label, and whether it was transparent."""

    pixels: Tensor
    label: int
    is_transparent: bool
    sha256: str = ""  # of the image's file, where it was asked for


@dataclass(frozen=True)
class Reader:
    """``reader.read(i, rng) -> Pixels``.

    Args:
        source: of encoded images (:mod:`iwin_dit.data.sources`), or of videos
            (:mod:`iwin_dit.data.clip_sources`) where there is a ``clip``.
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
        name = self.source.name(number)
        try:
            if self.clip is None:
                data, label = self.source.read(number)
                image = decode_image(data, name, background=self.background)
                sha256 = hashlib.sha256(data).hexdigest() if self.hashed else ""
                return Pixels(self._crop(image, rng), label, image.info.get(TRANSPARENT, False), sha256)
            frames, label = self.source.read(number, self.clip, rng, self.background)
            state = rng.get_state()
            cropped = []
            for frame in frames:
                rng.set_state(state)  # the same crop for every frame
                cropped.append(self._crop(frame, rng))
            return Pixels(torch.stack(cropped, 1), label, any(f.info.get(TRANSPARENT) for f in frames))
        except BadImage as error:
            kind = BadImage if self.clip is None else BadClip
            raise kind(str(error) if name in str(error) else f"{name}: {error}") from None

    def _crop(self, image: Any, rng: torch.Generator) -> Tensor:
        return (
            center_crop(image, *self.size) if self.crop == "center" else random_crop(image, *self.size, rng)
        )
