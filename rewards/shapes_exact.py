"""Does the picture show exactly what its caption says? The exact judge without partial credit.

    r = 1 if it does, else 0

Range: 0 or 1, so that the mean over images is the share of right ones: the gold reward of a run
that trains on `shapes`, whose partial credit is denser to learn from. The judge reads pixels only:
64×64 pictures, captions of the embedded world (`prompts/shapes.txt`); see
`diffusion_grpo.shapes.verify`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_grpo.shapes.captions import parse
from diffusion_grpo.shapes.verify import verify


def shapes_exact(
    images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> np.ndarray:
    """Score uint8 images [B, 64, 64, 3]; returns float32 [B], 0 or 1.

    Raises:
        UsageError: the images have another size, or a prompt is not a caption of this world.
    """
    return verify(images, prompts).passed.astype(np.float32)


def check(prompts: list[str], metadata: list[dict[str, Any]]) -> None:
    """Raise a `UsageError` for a prompt that is not a caption of this world."""
    for prompt in prompts:
        parse(prompt)


shapes_exact.check = check  # pyright: ignore[reportFunctionMemberAccess]
