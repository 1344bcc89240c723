"""The OCR reward reads what Pillow has written, in three fonts."""

from __future__ import annotations

import font_source_serif_pro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.reward import RewardSet, load_reward

FONTS = ("sans", "serif", "bitmap")


def written(text: str, font: str) -> np.ndarray:
    """A sign of 256x128 pixels with a text on it."""
    sign = Image.new("RGB", (256, 128), (240, 236, 220))
    if font == "bitmap":  # Pillow's own, 11 pixels high
        small = Image.new("RGB", (64, 32), (240, 236, 220))
        face = ImageFont.load_default_imagefont()
        ImageDraw.Draw(small).text((4, 10), text, font=face, fill=(20, 20, 90))
        return np.asarray(small.resize(sign.size, Image.Resampling.BICUBIC))
    face = (
        ImageFont.load_default(40)  # Aileron
        if font == "sans"
        else ImageFont.truetype(font_source_serif_pro.font_files_ttf["SourceSerifPro"], 40)
    )
    ImageDraw.Draw(sign).text((20, 40), text, font=face, fill=(20, 20, 90))
    return np.asarray(sign)


@pytest.fixture(scope="module")
def ocr() -> RewardSet:
    return RewardSet((load_reward("ocr"),), (1.0,))


def module():
    """The reward's file, as a module."""
    import sys

    return sys.modules[load_reward("ocr").function.__module__]


@pytest.mark.parametrize("font", FONTS)
def test_right_text_scores_high_and_wrong_text_low(ocr, font) -> None:
    texts = ("HELLO 42", "Open Late")
    wrong = ("BRIDGE", "zigzag")
    images = np.stack([written(text, font) for text in texts])
    right = ocr(images, [f'a sign that says "{text}"' for text in texts]).total
    assert right.min() >= 0.9
    assert ocr(images, [f'a sign that says "{text}"' for text in wrong]).total.max() <= 0.3


def test_an_empty_picture_scores_nothing_and_metadata_goes_first(ocr) -> None:
    images = np.stack([np.full((128, 256, 3), 255, np.uint8), written("OPEN", "sans")])
    found = ocr(images, ['it says "OPEN"', 'it says "CLOSED"'], [{}, {"text": "open"}]).total
    assert found[0] == 0 and found[1] == 1


def test_the_text_asked_for_stands_in_quotes() -> None:
    asked = module().asked_text
    for prompt, expected in (
        ('a sign that says "OPEN"', "OPEN"),
        ('"A" above "B c"', "A B c"),
        ("a sign “OPEN” by the sea", "OPEN"),
        ("ein Schild „OFFEN“", "OFFEN"),
        ("une enseigne «OUVERT»", "OUVERT"),
        ("a sign 'don't stop' there", "don't stop"),
        ("the baker's sign 'OPEN'", "OPEN"),
    ):
        assert asked(prompt, {}) == expected
    for prompt in ("a sign", 'an empty ""', "the baker's dog's sign", '"  "'):
        with pytest.raises(UsageError, match="asks for no text; expected it in quotes"):
            asked(prompt, {})
    with pytest.raises(UsageError, match="asks for no text"):
        asked('"A"', {"text": 3})


def test_prompts_without_a_text_are_found_before_the_run(ocr) -> None:
    with pytest.raises(UsageError, match="the prompt 'a dog' asks for no text"):
        ocr.check(['"A"', "a dog"], [{}, {}], group_size=2, what="")


@settings(max_examples=50, deadline=None, database=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_distance_is_levenshteins(first: str, second: str) -> None:
    def distance(a: str, b: str) -> int:
        """The definition, by recursion on the first letters."""
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return distance(a[1:], b[1:])
        return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))

    assert _FILE.edit_distance(first, second) == distance(first, second)


_FILE = module()


def test_the_score_ignores_case_and_spaces_and_counts_further_text() -> None:
    similarity = _FILE.similarity
    assert similarity("Hello World", "HELLO  world") == 1
    assert similarity("OPEN", "OPENING") == pytest.approx(4 / 7)
    assert similarity("abcd", "abxd") == 0.75
    assert similarity("abc", "") == 0


def test_the_prompt_lists_ask_for_texts_and_share_none(ocr) -> None:
    train, heldout = (load_prompts(name) for name in ("ocr", "ocr_heldout"))
    assert len(train) >= 50 and len(heldout) >= 20
    texts = [
        {_FILE.asked_text(p.text, p.metadata) for p in prompts} for prompts in (train, heldout)
    ]
    assert not texts[0] & texts[1]
    assert len(texts[0]) == len(train) and len(texts[1]) == len(heldout)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="min_confidence is 2.0; expected 0 to 1"):
        load_reward("ocr", {"min_confidence": "2"})
