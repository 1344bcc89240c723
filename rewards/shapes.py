"""Does the picture show exactly what its caption says? The exact judge of the embedded world.

    r = 1                                                     if it does
    r = 0.7 × (share of what was asked that is there) − 0.1 × (objects too many), at least 0

Range: 0 to 1. With `partial_credit=false` the second line is 0. What is asked: each object's shape
and color (any color of the palette where the caption names none), and size, relation and background
where it names them (see `diffusion_grpo.shapes.verify`). The judge reads
pixels only: 64×64 pictures, captions of the embedded world (`prompts/shapes.txt`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_grpo.reward import reward_factory
from diffusion_grpo.shapes.captions import parse
from diffusion_grpo.shapes.verify import verify


@reward_factory
def shapes(partial_credit: bool = True) -> Callable[..., np.ndarray]:
    """Build the reward.

    Args:
        partial_credit: whether a false picture gets part of the reward for what is right in it. A
            reward of 0 and 1 alone leaves groups of images without any difference to learn from.

    Returns:
        A reward of host images, in [0, 1].
    """

    def reward(
        images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Score uint8 images [B, 64, 64, 3]; returns float32 [B] in [0, 1].

        Raises:
            UsageError: the images have another size, or a prompt is not a caption of this world.
        """
        verdict = verify(images, prompts)
        return verdict.score if partial_credit else verdict.passed.astype(np.float32)

    def check(prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Raise a `UsageError` for a prompt that is not a caption of this world."""
        for prompt in prompts:
            parse(prompt)

    reward.check = check  # pyright: ignore[reportFunctionMemberAccess]
    return reward
