"""Sharpness: the variance of the Laplacian of the image's luma.

    r = Var(∇²Y),   ∇²Y(y, x) = Y(y−1, x) + Y(y+1, x) + Y(y, x−1) + Y(y, x+1) − 4 Y(y, x)

over the pixels that have four neighbors, with Y = 0.299 R + 0.587 G + 0.114 B in [0, 1]. The focus
measure LAPV of Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000).
Range: 0 (flat, or a linear ramp) to 16 (a checkerboard of single pixels); photographs have about
0.001 to 0.05. It counts noise as sharpness, and the prompt plays no part. No weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError


def sharpness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Score uint8 images [B, H, W, 3]; returns float32 [B] in [0, 16].

    Raises:
        UsageError: images of fewer than 3 pixels a side, which have no pixel with four neighbors.
    """
    _, height, width, _ = images.shape
    if min(height, width) < 3:
        raise UsageError(f"sharpness: images of {height}x{width} pixels; expected 3x3 or more")
    luma = images @ np.array([0.299, 0.587, 0.114]) / 255
    center = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return np.var(around - 4 * center, axis=(1, 2)).astype(np.float32)
