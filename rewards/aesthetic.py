"""LAION's aesthetic predictors: how much people like to look at an image; on device.

    r = W_n (… (W_1 e + b_1) …) + b_n,     e = f(image) / ‖f(image)‖

with f the image tower of OpenAI's CLIP ViT-L/14, and a head that is one linear layer (LAION
aesthetic predictor V1) or five without activation between them (V2, "improved aesthetic predictor",
which DDPO trained on). Range: ratings of about 0 to 10; V2 gives most pictures 4 to 7. The prompt
plays no part. Source: github.com/LAION-AI/aesthetic-predictor (MIT) and
github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0), whose .pth files can be
given as they are: they are read without executing anything. Default weights:
openai/clip-vit-large-patch14 (MIT), and the V2 head as trl-lib/ddpo-aesthetic-predictor has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import on_device, reward_factory
from diffusion_grpo.score_head import apply_head, score_head
from diffusion_grpo.weights import read_weights, weights_file


@reward_factory
def aesthetic(
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    model: str = "openai/clip-vit-large-patch14",
    batch_size: int = 32,
) -> Callable[..., jax.Array]:
    """Build the reward.

    Args:
        head: the head's weights, safetensors or .pth: a path, or owner/name/file of the hub.
        model: a folder or a hub id with the CLIPModel checkpoint that the head was trained on.
        batch_size: images embedded at once; lower it to save memory.

    Returns:
        A reward of device images.

    Raises:
        UsageError: a bad option, weights that cannot be used, or a head for another CLIP.
    """
    file = weights_file(head)
    layers = score_head(read_weights(file), source=str(file))
    embedder = CLIPEmbedder.from_pretrained("aesthetic", model, batch_size)
    width = layers[0][0].shape[1]
    if width != embedder.width:
        raise UsageError(
            f"aesthetic.head = {head!r} is for embeddings of {width} numbers, but aesthetic.model "
            f"= {model!r} has {embedder.width}; expected the CLIP that it was trained on"
        )

    @on_device
    def reward(images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]) -> jax.Array:
        """Score float32 images [B, H, W, 3] in [0, 1]; returns float32 [B]."""
        return apply_head(layers, embedder.images(images))

    reward.batch_size = batch_size  # so that no more of the images are made floats at once
    return reward
