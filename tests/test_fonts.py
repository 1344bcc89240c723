"""Captions in scripts that Pillow's font lacks, with the fonts of the tests' own choice."""

import font_source_serif_pro
import numpy as np
import pytest

from diffusion_grpo import fonts
from diffusion_grpo.commands import doctor
from diffusion_grpo.grids import image_grid

SERIF = font_source_serif_pro.font_files_ttf["SourceSerifPro"]  # Latin, Greek, Cyrillic; no Chinese


@pytest.fixture(autouse=True)
def one_font(monkeypatch):
    """As on a machine with one font, and with one that is not there before it."""
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no-such-font.ttf", SERIF))


@pytest.fixture
def no_font(one_font, monkeypatch):
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ())


def family(*texts):
    return fonts.font_for(texts, 15).getname()[0]


def drawn(caption, title=""):
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    return np.asarray(image_grid(image, [caption], columns=1, title=title))


def test_the_first_font_that_has_all_characters_is_chosen():
    assert family('a red circle, 50% {x} "~"\n') == "Aileron"
    for text in ("café", "красный круг", "κόκκινος"):
        assert fonts.lacking(text) == "" and family("a", text) == "Source Serif Pro"


def test_without_a_font_that_has_all_the_one_that_lacks_least_is_chosen():
    assert family("漢字") == "Aileron" and fonts.lacking("a漢字") == "漢字"
    assert family("Ж漢") == "Source Serif Pro" and fonts.lacking("Ж漢") == "漢"


def test_without_a_system_font_pillow_s_own_is_taken(no_font):
    assert family("круг") == "Aileron" and fonts.lacking("круг a") == "круг"


def differ(first, second):
    return first.shape != second.shape or bool((first != second).any())


def test_captions_and_headings_beyond_ascii_are_no_boxes():
    assert differ(drawn("жук"), drawn("яма"))
    assert differ(drawn("a", "ж"), drawn("a", "я"))


def test_boxes_are_alike_without_a_font(no_font):
    assert not differ(drawn("жук"), drawn("яма"))  # so that the test above would see them


def test_ascii_is_drawn_alike_with_and_without_system_fonts(monkeypatch):
    text = "".join(map(chr, range(32, 127)))
    pages = [drawn(text, text)]
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ())
    assert (pages[0] == drawn(text, text)).all()


def test_doctor_says_which_scripts_are_boxes():
    found = doctor.fonts()
    assert (
        found.status == "note" and "apt-get install fonts-dejavu-core fonts-noto-cjk" in found.mend
    )
    assert "boxes stand for Arabic, Chinese, Japanese, Korean" in found.found


def test_doctor_is_content_with_fonts_of_every_script(monkeypatch):
    monkeypatch.setattr(fonts, "lacking", lambda text: "")
    assert doctor.fonts().status == "ok"
