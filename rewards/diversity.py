"""Diversity: how far an image is from the others of its group, by their CLIP embeddings.

    r_i = 1/(G−1) Σ_{j≠i} (1 − ⟨e_i, e_j⟩),     e = f(image) / ‖f(image)‖

over the G images of one prompt; on device. Range: 0 (all alike) to 2; different photographs of one
thing have about 0.2. Its mean over a group is the group's mean pairwise cosine distance. Alone it
rewards anything but the prompt: give it a small weight beside another reward, against the collapse
of a group to one picture. Default weights: openai/clip-vit-large-patch14 (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.reward import of_group, on_device, reward_factory


@reward_factory
def diversity(
    model: str = "openai/clip-vit-large-patch14", batch_size: int = 32
) -> Callable[..., jax.Array]:
    """Build the reward.

    Args:
        model: a folder or a hub id with a Transformers CLIPModel checkpoint.
        batch_size: images embedded at once; lower it to save memory.

    Returns:
        A reward of the device images of one group.

    Raises:
        UsageError: a bad option, or a checkpoint that cannot be used.
    """
    embedder = CLIPEmbedder.from_pretrained("diversity", model, batch_size)

    @of_group
    @on_device
    def reward(images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]) -> jax.Array:
        """Score the float32 images [G, H, W, 3] of one prompt; returns float32 [G] in [0, 2]."""
        embeddings = embedder.images(images)
        distances = 1.0 - jnp.matmul(embeddings, embeddings.T, precision="highest")
        # An image's distance to itself is 0 but for rounding.
        others = distances * (1.0 - jnp.eye(len(images)))
        return others.sum(axis=1) / (len(images) - 1)

    return reward
