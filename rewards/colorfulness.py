"""Colorfulness: the metric M⁽³⁾ of Hasler and Süsstrunk.

    r = √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb),    rg = R − G,    yb = ½ (R + G) − B

with the means μ and standard deviations σ over the image's pixels, channels from 0 to 255. From
Hasler and Süsstrunk, "Measuring colorfulness in natural images" (SPIE 2003), section 7; what their
viewers called it: 0 not colorful, 15 slightly, 33 moderately, 45 averagely, 59 quite, 82 highly,
109 extremely. Range: 0 to about 200. The prompt plays no part. No weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def colorfulness(
    images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> np.ndarray:
    """Score uint8 images [B, H, W, 3]; returns float32 [B], at least 0."""
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread = np.sqrt(opponents.var(axis=(2, 3)).sum(axis=0))
    mean = np.sqrt(np.square(opponents.mean(axis=(2, 3))).sum(axis=0))
    return (spread + 0.3 * mean).astype(np.float32)
