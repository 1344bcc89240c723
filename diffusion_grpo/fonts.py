"""Fonts of captions: Pillow's own, or one of this machine's for the characters that it lacks."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from typing import Any

from PIL import ImageFont

# Files that Pillow finds in the system's folders, by Linux's names, macOS's and Windows'. Those of
# many scripts come first.
SYSTEM_FONTS: tuple[str, ...] = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "DroidSansFallbackFull.ttf"),
    *("wqy-zenhei.ttc", "wqy-microhei.ttc", "NotoSansArabic-Regular.ttf"),
    *("NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "unifont.otf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    *("arial.ttf", "segoeui.ttf", "msyh.ttc", "msgothic.ttc", "malgun.ttf"),
)
_TRIED = 20  # pixels, of the glyphs that are looked at
_NO_CHARACTER = "\U0010fffe"  # Unicode assigns it to nothing, so that a font draws its box


def font_for(texts: Iterable[str], size: float) -> Any:
    """Return a font that has the characters of all texts.

    Args:
        texts: what is to be written.
        size: in pixels.

    Returns:
        Pillow's own font where it has them all, as it has those of ASCII; else the first font of
        the system that does, or the one that lacks the fewest. What a font lacks it draws as boxes.
    """
    name = _chosen("".join(sorted(set("".join(texts)))))
    return _load(name, size)


def lacking(text: str) -> str:
    """Return the characters of a text that the font chosen for it lacks."""
    name = _chosen("".join(sorted(set(text))))
    return "".join(character for character in text if not _has(name, character))


def _chosen(characters: str) -> str | None:
    """Return the first font that lacks the fewest characters; None is Pillow's own."""

    def missing(name: str | None) -> int:
        return sum(not _has(name, character) for character in characters)

    if not missing(None):  # before the system's folders are looked through
        return None
    return min((None, *filter(_is_here, SYSTEM_FONTS)), key=missing)


@functools.cache
def _is_here(name: str) -> bool:
    try:
        _load(name, _TRIED)
    except OSError:
        return False
    return True


def _load(name: str | None, size: float) -> Any:
    return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)


@functools.cache
def _trial(name: str | None) -> tuple[Any, Any]:
    """Return a font, and what it draws for a character that it does not have."""
    font = _load(name, _TRIED)
    return font, _glyph(font, _NO_CHARACTER)


@functools.lru_cache(maxsize=100_000)
def _has(name: str | None, character: str) -> bool:
    # Spaces and controls have no glyph that could be missed.
    if character.isspace() or unicodedata.category(character) in ("Cc", "Cf"):
        return True
    font, box = _trial(name)
    return _glyph(font, character) != box


def _glyph(font: Any, character: str) -> tuple[Any, bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
