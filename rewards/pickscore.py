"""PickScore: which image people would pick for a prompt; on device.

    r = exp(logit_scale) ⟨f(image), g(prompt)⟩ / (‖f(image)‖ ‖g(prompt)‖)

with a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users, exp(logit_scale) = 100. From
Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation"
(2023). Range: most pictures score 17 to 24; the difference of two is the logit of one being
preferred. Default weights: yuvalkirstain/PickScore_v1, with the tokenizer and the image processor
of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.reward import on_device, reward_factory


@reward_factory
def pickscore(
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    batch_size: int = 16,
) -> Callable[..., jax.Array]:
    """Build the reward.

    Args:
        model: a folder or a hub id with a Transformers CLIPModel checkpoint.
        processor: a folder or a hub id with its tokenizer and image processor.
        batch_size: images embedded at once; lower it to save memory.

    Returns:
        A reward of device images.

    Raises:
        UsageError: a bad option, or a checkpoint that cannot be used.
    """
    embedder = CLIPEmbedder.from_pretrained("pickscore", model, batch_size, processor=processor)

    @on_device
    def reward(images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]) -> jax.Array:
        """Score float32 images [B, H, W, 3] in [0, 1]; returns float32 [B]."""
        return embedder.logit_scale * embedder.cosine(images, prompts)

    reward.batch_size = batch_size  # so that no more of the images are made floats at once
    return reward
