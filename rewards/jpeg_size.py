"""Compressibility: minus the size of the image as a JPEG, in kilobytes.

    r = -bytes(JPEG(image, quality)) / 1000      sign = "compressible"
    r = +bytes(JPEG(image, quality)) / 1000      sign = "incompressible"

The compressibility and incompressibility tasks of Black et al., "Training Diffusion Models with
Reinforcement Learning" (DDPO, 2023), section 5.1: JPEG at quality 95, 1 kB = 1000 bytes. The prompt
plays no part. Range: -0.7 (one flat color) to -5.5 (white noise) at 64 x 64, -4.7 to -308 at
512 x 512. No weights.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import reward_factory


@reward_factory
def jpeg_size(
    quality: int = 95, sign: Literal["compressible", "incompressible"] = "compressible"
) -> Callable[..., np.ndarray]:
    """Build the reward.

    Args:
        quality: JPEG quality as Pillow counts it, 1 to 100; DDPO uses 95.
        sign: whether small files score high, or large ones.

    Returns:
        A reward of host images.

    Raises:
        UsageError: the quality is out of range.
    """
    if not 1 <= quality <= 100:
        raise UsageError(f"jpeg_size: quality is {quality}; expected 1 to 100, DDPO uses 95")
    factor = -1.0 if sign == "compressible" else 1.0

    def kilobytes(image: np.ndarray) -> float:
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "JPEG", quality=quality)
        return len(encoded.getvalue()) / 1000

    def reward(
        images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Score uint8 images [B, H, W, 3]; returns float32 [B] in kilobytes."""
        return np.asarray([factor * kilobytes(image) for image in images], np.float32)

    return reward
