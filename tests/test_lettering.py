"""Names of classes in pictures: every letter is drawn, or the picture says less, and a warning why."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from iwin_dit.pipelines import lettering
from iwin_dit.pipelines.lettering import draw_predictions, font_for
from iwin_dit.pipelines.sampling import Sample, draw_grid

NAMES = ("golden retriever", "Äpfel", "кошка", "猫", "قطة", "😀", "γάτα", "แมว", "고양이")
BOX = chr(0x10FFFE)  # nobody's


def drawn(text, font):
    image = Image.new("L", (400, 40))
    ImageDraw.Draw(image).text((0, 0), text, fill=255, font=font)
    return np.asarray(image)


def grid(name):
    return np.asarray(draw_grid([Sample(7, 0, [Image.new("RGB", (64, 64))])], {7: name}))


@pytest.mark.parametrize("name", NAMES)
def test_no_letter_is_a_box(name, recwarn):
    font, picture = font_for(name, 14), grid(name)
    if font is None:  # no font of this computer has it
        assert "no font here has the letters of" in str(recwarn[0].message)
        assert np.array_equal(picture, grid("7")), "the class alone"
    else:
        assert not recwarn
        assert all(not np.array_equal(drawn(x, font), drawn(BOX, font)) for x in name if x != " ")
        assert not np.array_equal(picture, grid(BOX * len(name)))


def test_what_pillows_own_font_has_is_drawn_as_ever():
    font, own = font_for("golden retriever", 14), ImageFont.load_default(14)
    assert np.array_equal(drawn("golden retriever", font), drawn("golden retriever", own))
    assert np.array_equal(drawn("ä", own), drawn(BOX, own)), "the reason for all this"


def test_without_other_fonts_the_class_stands_alone(monkeypatch):
    monkeypatch.setattr(lettering, "FONTS", ())
    monkeypatch.setattr(lettering, "_matplotlibs", list)
    with pytest.warns(UserWarning, match="no font here has the letters of '7  猫'"):
        assert np.array_equal(grid("猫"), grid("7"))
    pixels, names = [np.zeros((8, 8, 3), np.uint8)] * 2, ["猫", "кошка"]
    pictures = [np.asarray(draw_predictions(pixels, [0, 1], [0, 0], n)) for n in (names, ["0", "1"])]
    assert np.array_equal(*pictures)
