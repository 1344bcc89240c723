"""CLIP score: how well an image fits its prompt, by any CLIPModel checkpoint; on device.

    r = ⟨f(image), g(prompt)⟩ / (‖f(image)‖ ‖g(prompt)‖)        scale = "cosine", in [−1, 1]
    r = exp(logit_scale) × that                                 scale = "logit"

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
OpenAI's checkpoints have exp(logit_scale) = 100; a good fit is a cosine of about 0.3. Default
weights: openai/clip-vit-large-patch14 (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import on_device, reward_factory


@reward_factory
def clip(
    model: str = "openai/clip-vit-large-patch14",
    scale: Literal["cosine", "logit"] = "cosine",
    batch_size: int = 32,
) -> Callable[..., jax.Array]:
    """Build the reward.

    Args:
        model: a folder or a hub id with a Transformers CLIPModel checkpoint.
        scale: "cosine", or "logit" for CLIP's own logit.
        batch_size: images embedded at once; lower it to save memory.

    Returns:
        A reward of device images.

    Raises:
        UsageError: a bad option, or a checkpoint that cannot be used.
    """
    if scale not in ("cosine", "logit"):
        raise UsageError(f"clip.scale = {scale!r} is not supported; expected 'cosine' or 'logit'")
    embedder = CLIPEmbedder.from_pretrained("clip", model, batch_size)
    factor = embedder.logit_scale if scale == "logit" else 1.0

    @on_device
    def reward(images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]) -> jax.Array:
        """Score float32 images [B, H, W, 3] in [0, 1]; returns float32 [B]."""
        return factor * embedder.cosine(images, prompts)

    reward.batch_size = batch_size  # so that no more of the images are made floats at once
    return reward
