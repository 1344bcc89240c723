"""Human Preference Score v2 and v2.1: which image people prefer for a prompt; on device.

    r = ⟨f(image), g(prompt)⟩ / (‖f(image)‖ ‖g(prompt)‖)

with a CLIP ViT-H/14 fine-tuned on human rankings; the cosine itself, as the authors' script prints
it (their tables show 100 times that). Range: most pictures score 0.2 to 0.35. From Wu et al.,
"Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis" (2023). An image that is not square is padded with black, not cropped. Default weights:
xswu/HPSv2 (Apache-2.0), in OpenCLIP's format; configuration, tokenizer and image processor of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.models.preprocess import clip_letterbox
from diffusion_grpo.open_clip import from_open_clip, is_open_clip
from diffusion_grpo.reward import on_device, reward_factory
from diffusion_grpo.weights import is_weights_file, read_weights, weights_file


@reward_factory
def hpsv2(
    model: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
    base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    batch_size: int = 16,
) -> Callable[..., jax.Array]:
    """Build the reward.

    Args:
        model: weights by OpenCLIP's or by Transformers' names, a path or owner/name/file of the
            hub (`xswu/HPSv2/HPS_v2_compressed.pt` is v2.0); or a folder or a hub id with a
            Transformers CLIPModel checkpoint.
        base: a folder or a hub id with tokenizer and image processor, and with the configuration
            of weights that are a file.
        batch_size: images embedded at once; lower it to save memory.

    Returns:
        A reward of device images.

    Raises:
        UsageError: a bad option, or weights that cannot be used.
    """
    tensors = None
    if is_weights_file(model):
        tensors = read_weights(weights_file(model))
        if is_open_clip(tensors):
            tensors = from_open_clip(tensors, source=model)
    embedder = CLIPEmbedder.from_pretrained(
        "hpsv2",
        model if tensors is None else base,
        batch_size,
        processor=base,
        tensors=tensors,
        preprocess=clip_letterbox,
    )

    @on_device
    def reward(images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]) -> jax.Array:
        """Score float32 images [B, H, W, 3] in [0, 1]; returns float32 [B] in [−1, 1]."""
        return embedder.cosine(images, prompts)

    reward.batch_size = batch_size  # so that no more of the images are made floats at once
    return reward
