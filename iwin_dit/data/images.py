"""Encoded images that strangers made: decoded safely to RGB, then cropped to the size of a model."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.runtime.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 178_000_000  # just below 2 * 89,478,485, from where Pillow itself refuses


class BadImage(DataError):
    """An image that is broken, too large or not of a format that we open."""


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB of 8 bits, upright: alpha is dropped, of an animation the first frame is taken.

    Args:
        data: a PNG, JPEG, WebP or BMP file.
        name: what to call it in an error.
        max_pixels: refused above this, from the header; Pillow's own limit holds as well.

    Raises:
        BadImage: where the image is too large, broken, cut off, empty or of another format.
    """
    if not data:
        raise BadImage(f"{name} is empty, not an image; restore or remove it")
    try:
        # What Pillow warns of is checked here (size) or does no harm (odd EXIF, palettes with alpha).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(
                    f"{name} is {width} x {height} = {width * height} pixels large, more than the "
                    f"{max_pixels} allowed; shrink or remove it"
                )
            image.load()
            return _to_rgb(_upright(image))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(
            f"{name} starts with {data[:8]!r} and has no valid header of a PNG, JPEG, WebP or BMP image; "
            "convert or remove it"
        ) from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name} is too large ({error}); shrink or remove it") from None
    except Exception as error:  # Pillow answers broken bytes with errors of many kinds
        reason = str(error) or type(error).__name__
        raise BadImage(f"{name} is a broken or truncated image ({reason}); restore or remove it") from error


def center_crop(image: Image.Image, height: int, width: int) -> Tensor:
    """The crop of ADM (guided-diffusion), by which published FIDs are computed: uint8
    ``(3, height, width)``.

    Raises:
        BadImage: where the image is so elongated that it cannot be scaled.
    """
    image = _cover(image, height, width)
    return _crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def random_crop(image: Image.Image, height: int, width: int, rng: torch.Generator) -> Tensor:
    """The same scale as :func:`center_crop`, at a place drawn from ``rng``: uint8 ``(3, height, width)``.

    Raises:
        BadImage: where the image is so elongated that it cannot be scaled.
    """
    image = _cover(image, height, width)
    # Two draws for every image, so that the next one's do not depend on this one's shape.
    top = int(torch.randint(image.height - height + 1, (), generator=rng))
    left = int(torch.randint(image.width - width + 1, (), generator=rng))
    return _crop(image, top, left, height, width)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # EXIF that cannot be parsed says nothing of the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255: 65535 / 255 = 257
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scales the image until it just covers ``height x width``."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = round(image.width * scale), round(image.height * scale)
    if size[0] * size[1] > max(MAX_PIXELS, 4 * height * width):  # a line of pixels would grow without bound
        raise BadImage(
            f"an image of {image.width} x {image.height} pixels would have to grow to {size[0]} x {size[1]} "
            f"to cover {width} x {height}; remove it"
        )
    return image.resize(size, Image.Resampling.BICUBIC)


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Tensor:
    return pil_to_tensor(image.crop((left, top, left + width, top + height))).contiguous()
