"""OCR: whether the image carries the text that the prompt asks for in quotes.

    r = 1 − d(asked, read) / max(|asked|, |read|)

with d the Levenshtein distance of two texts, compared without spaces and without regard to case.
`asked` is what stands between quotes in the prompt (several are joined), or the "text" beside it in
a .jsonl prompt file; `read` is what PP-OCR finds in the image, in reading order, by way of rapidocr
on onnxruntime (extra `ocr`; Apache-2.0 and MIT, the models come with rapidocr). Range: 0 (nothing
of it) to 1 (exactly that and nothing else). A normalized edit distance is the OCR reward of
Flow-GRPO (Liu et al. 2025) too, which divides by |asked| alone and forgives further text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.installing import install_command
from diffusion_grpo.reward import reward_factory

# "…", “…”, „…“, «…» anywhere; '…' and ‘…’ only around words, since it is an apostrophe too.
_QUOTED = re.compile(
    r"\"([^\"]+)\"|[“„]([^“”„]+)[”“]|«([^«»]+)»|(?<!\w)'((?:[^']|\b'\b)+)'(?!\w)|(?<!\w)‘([^‘’]+)’(?!\w)"
)


@reward_factory
def ocr(min_confidence: float = 0.5) -> Callable[..., np.ndarray]:
    """Build the reward.

    Args:
        min_confidence: text that is recognized with less is not counted, 0 to 1.

    Returns:
        A reward of host images.

    Raises:
        UsageError: a bad option, or rapidocr is not installed.
    """
    if not 0 <= min_confidence <= 1:
        raise UsageError(f"ocr: min_confidence is {min_confidence}; expected 0 to 1")
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UsageError(
            f"the reward ocr needs rapidocr and onnxruntime ({error}): {install_command('ocr')}"
        ) from None
    engine = RapidOCR(params={"Global.log_level": "critical", "Global.text_score": min_confidence})

    def read(image: np.ndarray) -> str:
        found = engine(np.ascontiguousarray(image[:, :, ::-1]))  # it takes BGR
        return " ".join(getattr(found, "txts", None) or ())

    def reward(
        images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Score uint8 images [B, H, W, 3]; returns float32 [B] in [0, 1]."""
        asked = [asked_text(*pair) for pair in zip(prompts, metadata, strict=True)]
        pairs = zip(asked, images, strict=True)
        return np.asarray([similarity(text, read(image)) for text, image in pairs], np.float32)

    def check(prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Raise a `UsageError` for a prompt that asks for no text."""
        for pair in zip(prompts, metadata, strict=True):
            asked_text(*pair)

    reward.check = check  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def asked_text(prompt: str, metadata: dict[str, Any]) -> str:
    """Return the text that an image is to carry.

    Raises:
        UsageError: the prompt has none in quotes, and its metadata no "text".
    """
    text = metadata.get("text")
    if text is None:
        quotes = (next(filter(None, groups)) for groups in _QUOTED.findall(prompt))
        text = " ".join(quotes)
    if not isinstance(text, str) or not _plain(text):
        raise UsageError(
            f"ocr: the prompt {prompt!r} asks for no text; expected it in quotes, such as "
            '\'a sign that says "OPEN"\', or under "text" in a .jsonl prompt file'
        )
    return text


def similarity(asked: str, read: str) -> float:
    """Return 1 − d / max(|asked|, |read|) of the texts without spaces and case."""
    first, second = _plain(asked), _plain(read)
    return 1.0 - edit_distance(first, second) / max(len(first), len(second), 1)


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
