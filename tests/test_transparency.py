"""Transparent pictures: the background shows through them, wherever images are decoded."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vae
from PIL import Image, ImageDraw
from test_images import RNG, assert_pixels, chunk, encoded, picture, png

from iwin_dit.build.data import build_dataset
from iwin_dit.config.parse import parse_arguments
from iwin_dit.data.extraction import Settings, extract
from iwin_dit.data.images import TRANSPARENT, decode_image
from iwin_dit.data.latents import LatentDataset
from iwin_dit.data.sources import ClipFolderSource, open_source
from iwin_dit.data.video import ClipSpec, choose_clip
from iwin_dit.runtime.colours import colour
from iwin_dit.runtime.errors import ConfigError, DataError

GROUND = (255, 128, 7)
WHITE = (255, 255, 255)


def composed(pixels, alpha, ground=GROUND):
    """Over the ground: the convex combination, to the nearest of 256 values."""
    share = np.asarray(alpha, dtype=float)[..., None] / 255
    return np.asarray(pixels, dtype=float) * share + np.array(ground) * (1 - share)


def assert_composed(data, pixels, alpha):
    image = decode_image(data, "a", background=GROUND)
    assert image.mode == "RGB"
    assert image.info[TRANSPARENT]
    np.testing.assert_allclose(np.asarray(image, dtype=float), composed(pixels, alpha), atol=0.5 + 1e-9)


def test_every_kind_of_transparency_is_composed():
    alpha = Image.fromarray(RNG.integers(0, 256, (24, 32), dtype=np.uint8))
    image = picture()
    image.putalpha(alpha)
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert_composed(encoded(image, format, **options), picture(), alpha)
    grey = picture().convert("L")
    assert_composed(encoded(Image.merge("LA", (grey, alpha))), grey.convert("RGB"), alpha)

    palette = picture().quantize(16)
    index = np.asarray(palette)
    assert_composed(encoded(palette, transparency=3), palette.convert("RGB"), np.where(index == 3, 0, 255))
    of_each = np.arange(0, 160, 10, dtype=np.uint8)
    assert_composed(encoded(palette, transparency=of_each.tobytes()), palette.convert("RGB"), of_each[index])

    flat = Image.new("RGB", (8, 8), (9, 9, 9))
    flat.putpixel((3, 3), (200, 0, 0))
    hidden = np.where((np.asarray(flat) == (9, 9, 9)).all(-1), 0, 255)
    assert_composed(encoded(flat, transparency=(9, 9, 9)), flat, hidden)


@pytest.mark.parametrize(("colours", "kind", "hidden"), [(1, 0, "4660"), (3, 2, "4660 4660 4660")])
def test_a_transparent_colour_of_sixteen_bits(colours, kind, hidden):
    values = np.full((4, 4, colours), 0x1234, dtype=">u2")
    values[1, 2] = 0xFFFF
    data = png(4, 4, [b"\0" + row.tobytes() for row in values], bits=16, colour=kind)
    transparent = chunk(b"tRNS", struct.pack(f">{colours}H", *map(int, hidden.split())))
    place = data.index(b"IDAT") - 4
    image = decode_image(data[:place] + transparent + data[place:], "a", background=GROUND)
    expected = np.full((4, 4, 3), GROUND)
    expected[1, 2] = 255
    assert_pixels(image, expected)


def test_what_is_opaque_stays_as_it_is():
    image = picture()
    image.putalpha(255)
    for data in (encoded(image), encoded(picture()), encoded(picture(), "JPEG")):
        with_ground, without = decode_image(data, "a", background=GROUND), decode_image(data, "a")
        assert_pixels(with_ground, without)
        assert not with_ground.info.get(TRANSPARENT)


def test_a_large_picture_is_composed_in_strips(monkeypatch):
    monkeypatch.setattr("iwin_dit.data.images.STRIP_PIXELS", 100)
    alpha = Image.fromarray(RNG.integers(0, 256, (24, 32), dtype=np.uint8))
    image = picture()
    image.putalpha(alpha)
    assert_composed(encoded(image), picture(), alpha)


def test_colours_are_names_or_three_numbers():
    assert colour("white") == WHITE
    assert colour("0,128,255") == (0, 128, 255)
    for text in ("whit", "256,0,0", "1,2", "1,2,3,4", "-1,2,3", "1, 2,3", "", "#ffffff"):
        with pytest.raises(ConfigError, match="expected white, black, or three numbers"):
            colour(text)


def draw_icons(root, ground=None, count=12):
    """Black on transparency, in class folders; or on a ground."""
    for i in range(count):
        icon = Image.new("RGBA", (20, 20), (0, 0, 0, 0) if ground is None else (*ground, 255))
        ImageDraw.Draw(icon).rectangle((3, 3 + i % 5, 15, 12), fill=(0, 0, 0, 255))
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        icon.save(path)
    return root


def made(folder, out, **options):
    settings = Settings(size=(16, 16), batch_images=5, shard_images=7, **options)
    extract(open_source(str(folder)), make_vae(), out, settings, {"vae": "vae"})
    return LatentDataset(out)


def everything(dataset):
    return dataset.read_raw(list(range(len(dataset))))


def test_icons_are_extracted_over_the_background(tmp_path, capsys):
    icons, pages = draw_icons(tmp_path / "icons"), draw_icons(tmp_path / "pages", WHITE)
    white = made(icons, tmp_path / "white")
    assert "12 images have transparent pixels, through which white shows" in capsys.readouterr().out
    assert torch.equal(everything(white), everything(made(pages, tmp_path / "on pages")))
    assert "transparent" not in capsys.readouterr().out
    assert white.index["background"] == "white"
    black = made(icons, tmp_path / "black", background="black")
    assert not torch.equal(everything(black), everything(white))
    with pytest.raises(DataError, match=r"begun with other settings .background: 'black' -> 'white'"):
        made(icons, tmp_path / "black")


def test_what_an_earlier_version_began_goes_on_to_the_same_bytes(tmp_path, capsys):
    icons = draw_icons(tmp_path / "icons")
    made(icons, tmp_path / "old", background=None)
    old = tmp_path / "old"
    before = {path.name: path.read_bytes() for path in old.glob("*.safetensors")}
    settings = json.loads((old / ".entries" / "settings.json").read_text())
    del settings["background"]
    (old / ".entries" / "settings.json").write_text(json.dumps(settings))
    (old / "latents_rank00_shard001.safetensors").unlink()
    dataset = made(icons, old)
    assert "was begun by an earlier version" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in old.glob("*.safetensors")} == before
    assert not dataset.has_checksums
    assert "background" not in dataset.index


def test_clips_are_composed_too(tmp_path):
    frames = []
    for i in range(6):
        icon = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        ImageDraw.Draw(icon).rectangle((i, 4, i + 5, 9), fill=(255, 0, 0, 255))
        frames.append(icon)
    (tmp_path / "clips" / "a" / "folder").mkdir(parents=True)
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "clips" / "a" / "folder" / f"{i}.png")
    gif = tmp_path / "clips" / "a" / "film.gif"
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=100, disposal=2, loop=0)
    source = ClipFolderSource(tmp_path / "clips")
    for i in range(2):
        clip = choose_clip(source.path(i), ClipSpec(6), torch.Generator(), WHITE)
        for frame, expected in zip(clip, frames, strict=True):
            ground = Image.new("RGBA", (16, 16), "white")
            assert_pixels(frame, Image.alpha_composite(ground, expected).convert("RGB"))


def test_training_from_images_sees_the_background(tmp_path, recipe):
    draw_icons(tmp_path / "icons")
    make_vae().save_pretrained(tmp_path / "vae")
    data = {"kind": "images", "path": str(tmp_path / "icons"), "vae": str(tmp_path / "vae")}
    model = {"num_classes": 2}

    def corner(**more):
        path = str(recipe(data={**data, "normalization": "vae", **more}, model=model))
        dataset = build_dataset(parse_arguments(["--config", path], Path(path))[0])
        return dataset[0][0][:, 0, 0].tolist()

    assert corner() == [255, 255, 255]
    assert corner(background="1,2,3") == [1, 2, 3]
    assert corner(background=None) == [0, 0, 0]
    for changes in ({"kind": "latents", "background": "black"}, {**data, "background": "whit"}):
        path = str(recipe(data={"normalization": "vae", **changes}, model=model))
        with pytest.raises(ConfigError, match=r"without data\.kind images|found the colour 'whit'"):
            parse_arguments(["--config", path], Path(path))
