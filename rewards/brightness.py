"""Brightness: the mean luma of the image.

    r = mean(0.2126 R + 0.7152 G + 0.0722 B) / 255

Luma by ITU-R BT.709, item 3.2, of the gamma-encoded values as they are stored. Range: 0 (black) to
1 (white). The prompt plays no part. No weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def brightness(
    images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> np.ndarray:
    """Score uint8 images [B, H, W, 3]; returns float32 [B] in [0, 1]."""
    channels = images.mean(axis=(1, 2), dtype=np.float64) / 255
    return (channels @ np.array([0.2126, 0.7152, 0.0722])).astype(np.float32)
