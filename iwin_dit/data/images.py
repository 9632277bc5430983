"""Encoded images that strangers made: decoded safely to RGB, then cropped to the size of a model."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from iwin_dit.data.folders import FORMATS, IS_POINTER
from iwin_dit.runtime import files, limits
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import DataError

Image.init()
READABLE = [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow know no AVIF
BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # of a pixel, by Pillow's mode; else 4
CODEC_BYTES = {"WEBP": 17, "AVIF": 13}  # of a pixel at the peak, measured where a codec keeps copies
PROGRESSIVE_BYTES = 8  # JPEG's coefficients are kept until the last pass
STRIP_PIXELS = 1 << 18  # are converted at a time
TRANSPARENT = "had transparent pixels"  # a key of ``image.info``
TIFF_TILE = (322, 323)  # tags: its width and height


class BadImage(DataError):
    """An image that is broken, too large or not of a format that we open."""


def decode_image(data: bytes, name: str, background: Colour | None = None) -> Image.Image:
    """The image as RGB of 8 bits, upright; of an animation the first frame is taken.

    Args:
        data: a file of one of ``FORMATS``.
        name: what to call it in an error.
        background: the colour that shows through transparent pixels; ``image.info`` then says
            ``TRANSPARENT``. With None alpha is dropped, as older versions did, and the colours that editors
            leave under transparent pixels appear, which are black in most files.

    Raises:
        BadImage: where the image is too large, broken, cut off, empty or of another format.
    """
    with _opened(data, name) as image:
        image.load()
        return to_rgb(_upright(image, name), background)


class Header(NamedTuple):
    """What is known of an image before it is decoded: (width, height), upright; whether it has an alpha."""

    size: tuple[int, int]
    has_alpha: bool


def read_header(data: bytes, name: str) -> Header:
    """Of the image that :func:`decode_image` would give.

    Raises:
        BadImage: where the header is broken or of another format, or the image is too large.
    """
    with _opened(data, name) as image:
        try:
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)  # by a quarter
        except Exception:  # as _upright, which then turns nothing
            is_turned = False
        return Header(image.size[::-1] if is_turned else image.size, image.has_transparency_data)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image, whose header was checked; all errors within become BadImage."""
    if not data:
        raise BadImage(f"{name} is empty, not an image; restore or remove it")
    try:
        # What Pillow warns of is checked here (size) or does no harm (odd EXIF, palettes with alpha).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=READABLE)
            _check_size(image, name)
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        if files.is_lfs_pointer(data):
            raise BadImage(f"{name} {IS_POINTER}") from None
        raise BadImage(
            f"{name} starts with {data[:8]!r} and has no valid header of a {', '.join(READABLE)} image; "
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


def _check_size(image: Image.Image, name: str) -> None:
    """Compares what the header says with the limits, before anything is decoded."""
    width, height = image.size
    pixels = width * height
    if pixels > limits.IMAGE_PIXELS:  # Pillow's own limit holds as well
        raise BadImage(
            f"{name} is {width} x {height} = {pixels} pixels large, more than the "
            f"{limits.IMAGE_PIXELS} allowed; shrink or remove it"
        )
    if image.mode in ("F", "I") and image.format != "PNG":  # which has 16 at most, and is I in old Pillows
        raise BadImage(f"{name} has channels of 32 bits; convert it to 8 or 16")
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # libtiff holds a whole tile, which may be larger
        pixels = max(pixels, math.prod(int(image.tag_v2.get(tag, 1)) for tag in TIFF_TILE))
    codec = PROGRESSIVE_BYTES if image.info.get("progressive") else CODEC_BYTES.get(image.format or "", 0)
    stored = 4 if image.mode == "RGB" else BYTES.get(image.mode, 4) + 4  # with what it becomes
    _check_bytes(image, name, pixels * max(codec, stored))


def _check_bytes(image: Image.Image, name: str, needed: int) -> None:
    if needed > limits.IMAGE_BYTES:
        raise BadImage(
            f"{name} is a {image.format} of {image.width} x {image.height} pixels that would take "
            f"{files.in_units(needed)} of memory, {files.in_units(limits.IMAGE_BYTES)} are allowed; "
            "shrink or remove it"
        )


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            _check_bytes(image, name, 2 * BYTES.get(image.mode, 4) * image.width * image.height)
            ImageOps.exif_transpose(image, in_place=True)
    except (BadImage, MemoryError):
        raise
    except Exception:  # EXIF that cannot be parsed says nothing of the pixels
        pass
    return image


def to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """In strips, since some conversions take several times the memory of what they convert."""
    if image.mode == "RGB" and (background is None or not image.has_transparency_data):
        return image
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    is_transparent = False
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        alpha = None if background is None else _alpha(strip)
        if strip.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255: 65535 / 255 = 257
            values = np.asarray(strip).astype(np.int64)
            strip = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
        strip = strip.convert("RGB")
        if alpha is not None and alpha.getextrema()[0] != 255:
            is_transparent = True
            strip = Image.composite(strip, Image.new("RGB", strip.size, background), alpha)
        rgb.paste(strip, (0, top))
    rgb.info[TRANSPARENT] = is_transparent
    return rgb


def _alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of each pixel, mode L; None where the image has none."""
    if not image.has_transparency_data:
        return None
    colour = image.info.get("transparency")
    if image.mode.startswith("I"):
        return Image.fromarray(np.where(np.asarray(image) == colour, 0, 255).astype(np.uint8))
    if isinstance(colour, tuple) and max(colour) > 255:  # of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image.convert("RGBA").getchannel("A")


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scales the image until it just covers ``height x width``."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = round(image.width * scale), round(image.height * scale)
    if size == image.size:
        return image
    if size[0] * size[1] > max(limits.SCALED_PIXELS, 4 * height * width):
        raise BadImage(
            f"an image of {image.width} x {image.height} pixels would have to grow to {size[0]} x {size[1]} "
            f"to cover {width} x {height}; remove it"
        )
    return image.resize(size, Image.Resampling.BICUBIC)


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Tensor:
    return pil_to_tensor(image.crop((left, top, left + width, top + height))).contiguous()
