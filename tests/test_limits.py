"""Small files that would become large ones: what reading them takes, by the kernel's count."""

import ctypes
import os
import struct
import traceback

import pytest
import torch
from PIL import GifImagePlugin, Image
from test_images import encoded, png

from iwin_dit.data.images import BadImage, center_crop, decode_image
from iwin_dit.data.video import ClipSpec, choose_clip
from iwin_dit.runtime import limits

SIDE = 2500  # of images that are decoded: enough that the rest does not count


def peak(action):
    """Bytes that ``action`` adds to a child process at its peak."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the parent's threads are not there
            ctypes.CDLL(None).malloc_trim(0)  # what is free could hide what is taken
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak begins anew
            before = high_water()
            action()
            os.write(writer, str(high_water() - before).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return int(answer)


def high_water():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def big(mode, format, **options):
    return encoded(Image.new(mode, (SIDE, SIDE)), format, **options)


@pytest.mark.parametrize(
    ("mode", "format", "options", "bytes_per_pixel"),
    [
        ("I;16", "PNG", {}, 6),
        ("RGBA", "PNG", {"compress_level": 1}, 8),
        ("RGB", "PNG", {"compress_level": 1}, 4),
        ("RGB", "JPEG", {"progressive": True}, 8),
        ("RGB", "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}, 8),
        ("RGBA", "WEBP", {"lossless": True}, 17),
        ("RGB", "AVIF", {"speed": 10}, 13),
        ("L", "TIFF", {"compression": "tiff_deflate"}, 5),
    ],
)
def test_decoding_takes_what_is_allowed_for(mode, format, options, bytes_per_pixel, monkeypatch):
    """The limit on bytes is one on memory: what a kind of image is taken to need is what it needs."""
    data = big(mode, format, **options)
    needed = bytes_per_pixel * SIDE * SIDE
    monkeypatch.setattr(limits, "IMAGE_BYTES", needed)
    assert peak(lambda: decode_image(data, "a")) < needed * 1.1 + 20e6
    monkeypatch.setattr(limits, "IMAGE_BYTES", needed - 1)
    with pytest.raises(BadImage, match=r"a is a \w+ of 2500 x 2500 pixels that would take .* of memory, "):
        decode_image(data, "a")


@pytest.mark.slow
def test_the_largest_grey_image_of_16_bits():
    side = 13_340
    data = png(side, side, [bytes(1 + 2 * side)] * side, bits=16, colour=0)
    assert len(data) < 400_000
    assert peak(lambda: center_crop(decode_image(data, "a"), 256, 256)) < limits.IMAGE_BYTES * 1.25


def test_a_tile_counts_that_is_larger_than_its_image():
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + 256)
    with pytest.raises(BadImage, match=r"TIFF of 16 x 16 pixels that would take 16\.8 GiB of memory"):
        decode_image(data, "a")


def test_the_frames_of_a_clip_count_together(tmp_path, monkeypatch):
    """Twelve frames of a megapixel, of one colour each: four megabytes in memory each."""
    side, number = 1000, 12
    frames = [Image.new("P", (side, side), i) for i in range(2)]
    header = GifImagePlugin.getheader(frames[0])[0]
    parts = [b"".join(GifImagePlugin.getdata(frame, duration=100)) for frame in frames]
    (tmp_path / "a.gif").write_bytes(b"".join([*header, *parts * (number // 2), b";"]))
    (tmp_path / "b").mkdir()
    for i in range(number):
        (tmp_path / "b" / f"{i:02d}.png").write_bytes(encoded(Image.new("L", (side, side))))
    monkeypatch.setattr(limits, "IMAGE_BYTES", 4 * number * side**2 - 1)
    for name in ("a.gif", "b"):
        with pytest.raises(BadImage, match=rf"{name}: 12 frames of a clip would take 45\.8 MiB of memory or"):
            choose_clip(str(tmp_path / name), ClipSpec(number), torch.Generator())
        assert len(choose_clip(str(tmp_path / name), ClipSpec(number - 1), torch.Generator())) == number - 1


def test_what_is_inflated_stays_in_proportion():
    assert limits.inflated(2_000) == 64 << 20
    assert limits.inflated(100 << 20) == 50 * (100 << 20)
