"""Decoding, cropping and the sources of encoded images."""

import contextlib
import hashlib
import importlib.resources
import io
import itertools
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps, features
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights

from iwin_dit.data.folders import FORMATS
from iwin_dit.data.images import READABLE, BadImage, center_crop, decode_image, random_crop, read_header
from iwin_dit.data.sources import (
    SYNSETS_SHA256,
    CsvSource,
    FolderSource,
    HuggingFaceSource,
    WebDatasetSource,
    open_source,
)
from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import DataError

RNG = np.random.default_rng(0)
WRITTEN = [
    format for format in FORMATS if format in READABLE and (format != "AVIF" or features.check("avif"))
]


def picture(height=24, width=32):
    """Smooth, so that JPEG keeps it, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=(), bits=8, colour=2):
    """A PNG by hand; each of ``rows`` begins with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    packer = zlib.compressobj()
    data = b"".join(packer.compress(row) for row in rows) + packer.flush()
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def assert_pixels(image, expected):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


# Decoding


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_formats_are_exact(format, options):
    assert_pixels(decode_image(encoded(picture(), format, **options), "a"), picture())


def test_jpegs_are_as_pillow_reads_them():
    data = encoded(picture(), "JPEG", quality=95)
    assert_pixels(decode_image(data, "a"), Image.open(io.BytesIO(data)))
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert_pixels(decode_image(data, "a"), Image.open(io.BytesIO(data)).convert("RGB"))
    difference = np.asarray(decode_image(data, "a"), dtype=int) - np.asarray(picture(), dtype=int)
    assert abs(difference).mean() < 5  # not inverted


def test_grey_palettes_and_bits_become_rgb():
    grey = picture().convert("L")
    assert_pixels(decode_image(encoded(grey), "a"), grey.convert("RGB"))
    palette = picture().quantize(16)
    assert_pixels(decode_image(encoded(palette), "a"), palette.convert("RGB"))
    bits = picture().convert("1")
    assert_pixels(decode_image(encoded(bits), "a"), bits.convert("RGB"))


@pytest.mark.filterwarnings("error")
def test_alpha_is_dropped():
    alpha = Image.fromarray(RNG.integers(0, 256, (24, 32), dtype=np.uint8))
    image = picture()
    image.putalpha(alpha)
    assert_pixels(decode_image(encoded(image), "a"), picture())
    grey = picture().convert("L")
    with_alpha = Image.merge("LA", (grey, alpha))
    assert_pixels(decode_image(encoded(with_alpha), "a"), grey.convert("RGB"))
    palette = picture().quantize(16)
    for transparency in (3, bytes(range(0, 160, 10))):
        data = encoded(palette, transparency=transparency)
        assert_pixels(decode_image(data, "a"), palette.convert("RGB"))
    assert_pixels(decode_image(encoded(picture(), transparency=(0, 0, 0)), "a"), picture())


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 128, 129, 255, 256, 257, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    data = png(values.shape[1], 1, [b"\0" + values.astype(">u2").tobytes()], bits=16, colour=0)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    expected = np.round(values / 65535 * 255).astype(np.uint8)
    assert_pixels(decode_image(data, "a"), np.stack([expected] * 3, -1))
    colours = np.array([[0, 65535, 32896]], dtype=">u2")
    data = png(1, 1, [b"\0" + colours.tobytes()], bits=16, colour=2)
    assert_pixels(decode_image(data, "a"), np.array([[[0, 255, 128]]]))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(format):
    frames = [picture(), Image.new("RGB", picture().size, "red")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert_pixels(decode_image(data, "a"), picture())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's top is on the right: turn clockwise
    options = {"lossless": True} if format == "WEBP" else {}
    plain, turned = encoded(picture(), format, **options), encoded(picture(), format, exif=exif, **options)
    expected = Image.open(io.BytesIO(plain)).transpose(Image.Transpose.ROTATE_270)
    assert decode_image(turned, "a").size == read_header(turned, "a").size == (24, 32)
    assert read_header(plain, "a").size == (32, 24)
    assert_pixels(decode_image(turned, "a"), expected)


def test_a_picture_is_turned_though_its_exif_cannot_be_written_again():
    """Pillow turns the pixels first; a text where a number belongs then stops it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.ImageDescription] = 6, "abc"
    data = encoded(picture(), "PNG", exif=exif.tobytes().replace(b"\x01\x0e\x00\x02", b"\x01\x07\x00\x02"))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert_pixels(decode_image(data, "a"), np.rot90(picture(), -1))


def test_a_size_is_read_from_the_header_alone():
    data = encoded(picture())
    assert read_header(data[:60], "a") == ((32, 24), False)
    assert read_header(encoded(picture().convert("RGBA"))[:60], "a") == ((32, 24), True)
    for bad, message in ((b"", "is empty"), (b"x" * 60, "header"), (png(20_000, 20_000), "too large")):
        with pytest.raises(BadImage, match=message):
            read_header(bad, "a")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", [b"", b"junk", b"MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03"])
def test_broken_exif_is_ignored(exif):
    plain, odd = encoded(picture(), "JPEG"), encoded(picture(), "JPEG", exif=b"Exif\0\0" + exif)
    assert_pixels(decode_image(odd, "a"), Image.open(io.BytesIO(plain)))


def test_a_bomb_is_refused_from_its_header():
    bomb = png(20_000, 20_000)
    assert len(bomb) <= 69
    with pytest.raises(BadImage, match=r"b\.png is too large .*400000000 pixels"):
        decode_image(bomb, "b.png")
    # Pillow alone would only warn of this one, and decode it.
    data = png(13_350, 13_340, itertools.repeat(bytes(1 + 3 * 13_350), 13_340))
    before = peak_bytes()
    with pytest.raises(BadImage, match=r"c\.png is 13350 x 13340 = 178089000 pixels .* 178000000"):
        decode_image(data, "c.png")
    assert peak_bytes() - before < 50e6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_the_limit_is_ours(format, monkeypatch):
    data = encoded(picture(), format)
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 24 * 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1)  # Pillow now warns, which is not our limit
    assert decode_image(data, "a").size == (32, 24)
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 24 * 32 - 1)
    with pytest.raises(BadImage, match=r"a is 32 x 24 = 768 pixels large, more than the 767 allowed"):
        decode_image(data, "a")
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 24 * 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # and now it raises
    with pytest.raises(BadImage, match="a is too large"):
        decode_image(data, "a")


FITS = b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not an image", "no valid header"),
        (
            FITS,
            "starts with b'SIMPLE  ' and has no valid header of a PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF",
        ),
        (encoded(picture(), "PPM"), "no valid header"),
        (encoded(picture(), "ICO"), "no valid header"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "channels of 32 bits"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (encoded(NOISE)[:20], "header|broken or truncated"),
        (png(0, 0), "header|broken"),
        (png(8, 8), "broken or truncated"),
        (encoded(NOISE)[:20] + b"\xff" * 5000, "header|broken or truncated"),
        *(
            (encoded(NOISE, format)[:-3000], "header|broken or truncated")
            for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
        ),
    ],
)
def test_what_is_no_whole_image_is_refused(data, reason):
    with pytest.raises(BadImage, match=rf"^b é\.png .*({reason})") as caught:
        decode_image(data, "b é.png")
    assert "\n" not in str(caught.value)


def test_damage_anywhere_is_a_bad_image_or_an_image(monkeypatch):
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 10**6)
    for format in WRITTEN:
        whole = encoded(picture(), format)
        for _ in range(150):
            data = bytearray(whole)
            for place in RNG.integers(0, len(data), 3):
                data[place] = RNG.integers(256)
            with contextlib.suppress(BadImage):
                assert decode_image(bytes(data), "a").mode == "RGB"


# Cropping


def adm_reference(image, size):
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(50, 60), (37, 21), (64, 64), (128, 129), (300, 131), (5, 9), (32, 333), (31, 47)]
)
def test_the_centre_crop_is_adms(shape):
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    crop = center_crop(image, 32, 32)
    assert crop.dtype == torch.uint8
    assert crop.is_contiguous()
    np.testing.assert_array_equal(crop.permute(1, 2, 0), adm_reference(image, 32))


@pytest.mark.parametrize("shape", [(50, 60), (100, 30), (30, 100), (200, 200), (7, 5)])
@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16)])
def test_crops_of_any_shape(shape, height, width):
    image = picture(*shape)
    crop = center_crop(image, height, width)
    assert crop.shape == (3, height, width)
    # The picture's gradients: the crop is centred, and one of its axes spans the whole image.
    for channel in (0, 1):
        whole = np.asarray(image)[..., channel].mean()
        assert crop[channel].float().mean().item() == pytest.approx(whole, abs=15)
    spans = [(crop[0, :, -1].float().mean() - crop[0, :, 0].float().mean()) / 255]
    spans.append((crop[1, -1].float().mean() - crop[1, 0].float().mean()) / 255)
    assert max(spans) > 0.75


def test_random_crops_are_drawn_from_the_generator():
    image = picture(20, 45)
    first, again = (
        [random_crop(image, 16, 24, torch.Generator().manual_seed(s)) for s in range(40)] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    scaled = image.resize((36, 16), Image.Resampling.BICUBIC)  # 24 x 16 is just covered
    whole = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    places = [[x for x in range(13) if torch.equal(whole[:, :, x : x + 24], crop)] for crop in first]
    assert all(len(place) == 1 for place in places)
    assert {0, 12} <= {x for [x] in places}
    assert len({x for [x] in places}) > 8


def test_the_next_draw_does_not_depend_on_the_shape():
    states = []
    for shape in ((40, 90), (90, 40), (16, 16)):
        rng = torch.Generator().manual_seed(0)
        assert random_crop(picture(*shape), 16, 16, rng).shape == (3, 16, 16)
        states.append(rng.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_a_line_of_pixels_does_not_grow_without_bound():
    with pytest.raises(BadImage, match="1 x 60000 pixels would have to grow to 256 x 15360000"):
        center_crop(Image.new("RGB", (1, 60_000)), 256, 256)


def test_an_image_grows_to_four_times_what_is_cropped(monkeypatch):
    monkeypatch.setattr(limits, "SCALED_PIXELS", 1)
    assert center_crop(Image.new("RGB", (2, 8)), 16, 16).shape == (3, 16, 16)
    with pytest.raises(BadImage, match="2 x 9 pixels would have to grow to 16 x 72"):
        center_crop(Image.new("RGB", (2, 9)), 16, 16)


# Folders


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(4, 4)) if data is None else data)
    return path


def assert_readable(source):
    """A source as a worker process gets it."""
    copy = pickle.loads(pickle.dumps(source))
    assert copy.class_names == source.class_names
    assert len(copy) == len(source)
    for i in range(len(source)):
        assert copy.read(i) == source.read(i)
        assert copy.name(i) == source.name(i)
        decode_image(source.read(i)[0], source.name(i))


NAMES = [
    "b/z.png",
    "b/a.JPG",
    "b/sub/0.jpeg",
    "b/sub two/q.bmp",
    "b/sub-x/q.webp",
    "b é/ünï 漢.png",
    "B/1.png",
    "a/10.png",
    "a/9.png",
]


def test_folders_are_in_the_order_of_torchvision(tmp_path):
    for number, name in enumerate([*NAMES, f"b/{'long' * 60}.png", f"{'deep' * 50}/{'er' * 100}/a.png"]):
        write(tmp_path / name, encoded(Image.new("RGB", (1, 1), (number, 0, 0))))
    write(tmp_path / "b/notes.txt", b"nothing")
    write(tmp_path / "beside.png")
    reference = ImageFolder(str(tmp_path))
    source = FolderSource(tmp_path)
    assert isinstance(open_source(str(tmp_path)), FolderSource)
    assert source.class_names == reference.classes
    assert [source.name(i) for i in range(len(source))] == [path for path, _ in reference.samples]
    for i, (path, label) in enumerate(reference.samples):
        assert source.read(i) == (Path(path).read_bytes(), label)
    assert_readable(source)


def test_hidden_files_and_folders_are_ignored(tmp_path):
    kept = [write(tmp_path / "a/1.png"), write(tmp_path / "b/2.png")]
    for name in ("a/._1.png", "a/.hidden/3.png", ".cache/4.png", "b/.DS_Store"):
        write(tmp_path / name)
    source = FolderSource(tmp_path)
    assert source.class_names == ["a", "b"]
    assert [source.name(i) for i in range(len(source))] == [str(path) for path in kept]


def test_empty_folders_are_listed(tmp_path):
    with pytest.raises(DataError, match="there are no images in any class folder"):
        FolderSource(tmp_path)
    (tmp_path / "cat/deeper").mkdir(parents=True)
    (tmp_path / "dog").mkdir()
    write(tmp_path / "dog/readme.txt")
    with pytest.raises(DataError, match="there are no images in cat, dog of"):
        FolderSource(tmp_path)
    write(tmp_path / "owl/1.png")
    with pytest.raises(DataError, match=r"2 of 3 class folders .* have no images: cat, dog; fill"):
        FolderSource(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        FolderSource(tmp_path / "no")


@pytest.mark.parametrize("target", [".", "..", "../b", "../a", "loop", "../../root"])
def test_loops_are_reported(tmp_path, target):
    root = tmp_path / "root"
    write(root / "a/1.png")
    write(root / "b/2.png")
    (root / "a/loop").symlink_to(target)
    (root / "b/loop").symlink_to("../a")
    with pytest.raises(DataError, match="loop"):
        FolderSource(root)


def test_links_may_not_lead_out(tmp_path):
    outside = write(tmp_path / "outside/1.png")
    root = tmp_path / "root"
    write(root / "a/1.png")
    (root / "a/2.png").symlink_to("1.png")  # within is fine
    (root / "c").symlink_to("a")
    assert len(FolderSource(root)) == 4
    for link, target in (
        (root / "a/3.png", outside),
        (root / "a/deep", outside.parent),
        (root / "d", outside.parent),
    ):
        link.symlink_to(target)
        with pytest.raises(DataError, match=f"{link.name} is a link to {target}, out of"):
            FolderSource(root)
        link.unlink()
    (root / "a/dead.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"dead\.png is a link that loops or leads nowhere"):
        FolderSource(root)


def test_a_root_may_be_a_link(tmp_path):
    write(tmp_path / "real/a/1.png")
    (tmp_path / "link").symlink_to("real")
    assert_readable(FolderSource(tmp_path / "link"))


def test_names_that_are_not_unicode(tmp_path):
    try:
        write(Path(os.fsdecode(bytes(tmp_path) + b"/a/\xff.png")))
    except OSError:
        pytest.skip("this file system has Unicode names only")
    source = FolderSource(tmp_path)
    source.name(0).encode()
    assert source.read(0)[1] == 0


def test_a_file_that_went_away(tmp_path):
    path = write(tmp_path / "a/1.png")
    source = FolderSource(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"1\.png cannot be read: No such file"):
        source.read(0)


def test_imagenets_synsets_get_their_names(tmp_path):
    synsets = (importlib.resources.files("timm.data") / "_info/imagenet_synsets.txt").read_text().split()
    assert hashlib.sha256("\n".join(sorted(synsets)).encode()).hexdigest() == SYNSETS_SHA256
    for synset in synsets:
        write(tmp_path / synset / "1.JPEG", b"x")
    source = FolderSource(tmp_path)
    assert source.class_names == ResNet18_Weights.DEFAULT.meta["categories"]
    assert source.class_names[sorted(synsets).index("n02099601")] == "golden retriever"
    (tmp_path / synsets[7]).rename(tmp_path / "n99999999")  # a thousand, but not these
    assert "n99999999" in FolderSource(tmp_path).class_names


# CSV


def write_csv(folder, text):
    path = folder / "labels.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_csv_of_names_and_of_integers(tmp_path):
    for i, name in enumerate(("1.png", "ü, 2.png", "sub/3.png")):
        write(tmp_path / "images" / name, encoded(Image.new("RGB", (1, 1), (i, 0, 0))))
    images = tmp_path / "images"
    path = write_csv(tmp_path, '\ufefffile,label\r\n1.png,owl\r\n"ü, 2.png",cat\r\nsub/3.png,owl\r\n')
    source = open_source(str(images), str(path))
    assert isinstance(source, CsvSource)
    assert source.class_names == ["cat", "owl"]
    assert [source.read(i)[1] for i in range(3)] == [1, 0, 1]
    assert source.read(1)[0] == (images / "ü, 2.png").read_bytes()
    assert_readable(source)
    source = CsvSource(images, write_csv(tmp_path, "label,file\n10,1.png\n9,sub/3.png\n"))
    assert source.class_names == [str(i) for i in range(11)]
    assert [source.read(i)[1] for i in range(2)] == [10, 9]
    assert_readable(source)
    source = CsvSource(images, write_csv(tmp_path, "file,label\n1.png,10\nsub/3.png,x\n1.png,10\n"))
    assert source.class_names == ["10", "x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.png,0\n", "expected the header file,label"),
        ("", "expected the header file,label"),
        ("file,label\n", "lists no images"),
        ("file,label\n1.png,0\ngone.png,0\n", r"labels\.csv, line 3: gone\.png is not in"),
        ("file,label\n../labels.csv,0\n", r"line 2: \.\./labels\.csv leads out of"),
        ("file,label\n/etc/passwd,0\n", "line 2: /etc/passwd leads out of"),
        ("file,label\n1.png,0\nout.png,0\n", r"line 3: .*out\.png is a link to .*, out of"),
        ("file,label\nloop.png,0\n", r"line 2: loop\.png is not in .* symbolic links"),
        ("file,label\nfolder,0\n", "line 2: folder in .* is not a file"),
        ("file,label\n1.png\n", "line 2: found"),
        ("file,label\n1.png,\n", "labels are missing .line 2: ''"),
        ("file,label\n1.png,0,0\n", "line 2: found"),
        ("file,label\n,0\n", "line 2: found .'', '0'., expected a file and a label"),
        ("file,label\n1.png,-1\n", "line 2: found label '-1'"),
        (
            "file,label\n1.png,4000000000\n",
            "line 2: found label '4000000000', expected an integer from 0",
        ),
        ("file,label\n1\0.png,0\n", "line 2|cannot be read"),
        (b"file,label\n\xff.png,0\n", "cannot be read as CSV in UTF-8"),
        ('file,label\n"1.png,0\n', "cannot be read as CSV"),
    ],
)
def test_bad_csvs_are_refused(tmp_path, text, message):
    write(tmp_path / "images/1.png")
    (tmp_path / "images/folder").mkdir()
    (tmp_path / "images/out.png").symlink_to(write(tmp_path / "out.png"))
    (tmp_path / "images/loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=message):
        CsvSource(tmp_path / "images", write_csv(tmp_path, text))


def test_no_csv_and_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv cannot be read"):
        CsvSource(tmp_path, tmp_path / "gone.csv")
    with pytest.raises(DataError, match="is not a folder"):
        CsvSource(tmp_path / "gone", write_csv(tmp_path, "file,label\n"))


# Tar shards


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def one_pixel(value):
    return encoded(Image.new("RGB", (1, 1), (value, 0, 0)))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_are_read_in_place(tmp_path, format):
    second = [
        ("c.cls", b"2"),
        ("c.png", one_pixel(2)),
        (f"{'x/' * 80}漢.png", one_pixel(3)),
        (f"{'x/' * 80}漢.cls", b"0"),
    ]
    write_tar(tmp_path / "s-1.tar", second, format)
    first = [
        ("dir.v1/a.jpg", one_pixel(0)),
        ("dir.v1/a.json", b'{"label": 1, "caption": "x"}'),
        ("dir.v1/._a.jpg", b"junk"),
        ("b.PNG", one_pixel(1)),
        ("b.cls", b" 0\n"),
        ("b.json", b'{"label": 5}'),
        ("b.txt", b"a caption"),
        ("c.json", b"[]"),
    ]
    write_tar(tmp_path / "s-0.tar", first, format)
    for location in (tmp_path, tmp_path / "*.tar"):
        source = open_source(str(location))
        assert isinstance(source, WebDatasetSource)
        assert [source.read(i) for i in range(4)] == [
            (one_pixel(0), 1),
            (one_pixel(1), 0),
            (one_pixel(2), 2),
            (one_pixel(3), 0),
        ]
        assert source.class_names == ["0", "1", "2"]
        assert source.name(0) == f"{tmp_path}/s-0.tar:dir.v1/a.jpg"
        assert_readable(source)
    assert len(open_source(str(tmp_path / "s-1.tar"))) == 2
    assert sorted(os.listdir(tmp_path)) == ["s-0.tar", "s-1.tar"]


def test_class_names_beside_tars(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.png", one_pixel(0)), ("a.cls", b"1")])
    (tmp_path / "class_names.json").write_text(json.dumps(["cat", "owl", "eel"]))
    assert WebDatasetSource(tmp_path).class_names == ["cat", "owl", "eel"]
    (tmp_path / "classes.txt").write_text("Katze\nEule, groß\n")
    assert WebDatasetSource(tmp_path / "s.tar").class_names == ["Katze", "Eule, groß"]
    (tmp_path / "classes.txt").write_text("Katze\n")
    with pytest.raises(DataError, match=r"a\.png: found label 1, but only 1 classes are named"):
        WebDatasetSource(tmp_path)
    (tmp_path / "classes.txt").unlink()
    for text in ("{}", "[1]", "["):
        (tmp_path / "class_names.json").write_text(text)
        with pytest.raises(DataError, match=r"class.names"):
            WebDatasetSource(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "there are no samples in 1 .tar files"),
        ([("a.cls", b"0")], "there are no samples"),
        ([("a.png", b"x")], r"s\.tar:a\.png has no label; expected a\.cls"),
        ([("a.png", b"x"), ("a.json", b"{}")], "has no label"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], r"a\.jpg is a second image of a"),
        ([("a.png", b"x"), ("a.cls", b"cat")], r"a\.cls: found label 'cat', expected an integer"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "found label '-1'"),
        ([("a.png", b"x"), ("a.cls", b"999999999")], "found label '999999999'"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], "found label 'True'"),
        ([("a.png", b"x"), ("a.json", b"{")], r"a\.json is not JSON"),
        ([("a.png", b"x"), ("a.json", b"[" * 100_000)], r"a\.json is not JSON"),
        ([("a.png", b"x"), ("a.cls", bytes((1 << 20) + 1))], "has 1048577 bytes; expected a label"),
    ],
)
def test_bad_tars_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=message):
        WebDatasetSource(tmp_path)


def test_damaged_tars_are_refused(tmp_path):
    members = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", one_pixel(i)), ("cls", b"0"))
    ]
    path = write_tar(tmp_path / "s.tar", members)
    whole = path.read_bytes()
    for cut in (0, 100, 600, 1024, 2048, 2100, 4096, 5000, 6144):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"s\.tar is (damaged or cut off|not a whole)"):
            WebDatasetSource(tmp_path)
    path.write_bytes(whole[:2048] + b"\xff" * 512 + whole[2560:])
    with pytest.raises(DataError, match="damaged or cut off after 2048 bytes"):
        WebDatasetSource(tmp_path)
    path.write_bytes(whole)
    source = WebDatasetSource(tmp_path)
    path.write_bytes(whole[:4000])
    with pytest.raises(DataError, match="the shard changed"):
        source.read(2)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.read(2)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_tars_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"a\.png is a link"):
        WebDatasetSource(tmp_path)


# Hugging Face


def have_datasets():
    try:
        import datasets  # noqa: F401
    except ImportError:
        return False
    return True


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'iwin-dit\[datasets\]'"):
        open_source("hf:someone/something")
    write(tmp_path / "0.parquet", b"")
    with pytest.raises(DataError, match=r"pip install 'iwin-dit\[datasets\]'"):
        open_source(str(tmp_path))


def write_parquet(path, monkeypatch, labels, label_feature, column="label", rows=None):
    """A small dataset as the hub keeps them; the package's cache goes beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path.parent.parent / "cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": one_pixel(i), "path": None} for i in range(len(labels))] if rows is None else rows
    features = datasets.Features(
        {"id": datasets.Value("string"), "pixels": datasets.Image(), column: label_feature}
    )
    content = {"id": ["x"] * len(labels), "pixels": rows, column: labels}
    datasets.Dataset.from_dict(content, features=features).to_parquet(path)


@pytest.mark.skipif(not have_datasets(), reason="tested without the package above")
def test_parquet_is_read(tmp_path, monkeypatch):
    import datasets

    names = datasets.ClassLabel(names=["cat", "owl"])
    write_parquet(tmp_path / "named/train-00000-of-00001.parquet", monkeypatch, [1, 0, 1], names, "class")
    write_parquet(tmp_path / "named/test-00000-of-00001.parquet", monkeypatch, [0], names, "class")
    source = open_source(str(tmp_path / "named"))
    assert isinstance(source, HuggingFaceSource)
    assert source.class_names == ["cat", "owl"]
    assert [source.read(i) for i in range(3)] == [(one_pixel(0), 1), (one_pixel(1), 0), (one_pixel(2), 1)]
    assert source.name(2) == f"{tmp_path}/named, row 2"
    assert_readable(source)
    assert len(HuggingFaceSource(tmp_path / "named", "test")) == 1
    with pytest.raises(DataError, match=r"no parquet files of the split validation .* found test-.*, train-"):
        HuggingFaceSource(tmp_path / "named", "validation")
    write_parquet(tmp_path / "plain/data/0.parquet", monkeypatch, [3, 0], datasets.Value("int64"))
    source = open_source(f"hf:{tmp_path}/plain")
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.read(0) == (one_pixel(0), 3)
    assert_readable(source)
    assert len(open_source(str(tmp_path / "plain"))) == 2


@pytest.mark.skipif(not have_datasets(), reason="tested without the package above")
def test_bad_parquet_is_refused(tmp_path, monkeypatch):
    import datasets

    integer = datasets.Value("int64")
    write_parquet(tmp_path / "a/0.parquet", monkeypatch, [0.5], datasets.Value("float64"))
    with pytest.raises(DataError, match=r"has 0 columns of class labels, or .*; choose by --label-column"):
        HuggingFaceSource(tmp_path / "a")
    for folder, label in (("b", -1), ("c", None), ("d", 10**9)):
        write_parquet(tmp_path / folder / "0.parquet", monkeypatch, [0, label], integer)
        with pytest.raises(DataError, match=f"{folder}, row 1: found label '{label}', expected an integer"):
            HuggingFaceSource(tmp_path / folder)
    write_parquet(tmp_path / "e/0.parquet", monkeypatch, [0], integer, rows=[None])
    with pytest.raises(DataError, match="row 0 holds no image"):
        HuggingFaceSource(tmp_path / "e").read(0)
    write(tmp_path / "f/0.parquet", b"nothing")
    with pytest.raises(DataError, match=r"the split train of .* cannot be loaded"):
        HuggingFaceSource(tmp_path / "f")


# Which source


def test_locations_that_cannot_work(tmp_path):
    with pytest.raises(DataError, match="gone does not exist; give a folder of images"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(DataError, match="x does not exist"):
        open_source("x" * 5000)
    with pytest.raises(DataError, match=r"notes\.txt is neither a folder nor a \.tar file"):
        open_source(str(write(tmp_path / "notes.txt")))
    with pytest.raises(DataError, match="there are no samples in 0"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match="has labels of its own"):
        open_source("hf:someone/something", "labels.csv")


def test_locations_with_glob_characters(tmp_path):
    folder = tmp_path / "set [1]*"
    write(folder / "a/1.png")
    assert len(open_source(str(folder))) == 1
    write_tar(tmp_path / "tars [2]" / "s[0].tar", [("a.png", b"x"), ("a.cls", b"0")])
    assert len(open_source(str(tmp_path / "tars [2]"))) == 1
    assert len(open_source(str(tmp_path / "tars [2]/s[0].tar"))) == 1
