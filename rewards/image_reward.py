"""ImageReward: what people think of an image and of how it fits its prompt; BLIP, on device.

    r = (h(x) − 0.16717362830052426) / 1.0333394966054072

with x the state of BLIP's text encoder at the first token when it reads the prompt (35 tokens at
most) with cross-attention to the image's patches at 224 pixels, and h five linear layers without
activation between them. The two numbers are mean and standard deviation of h(x) over the training
data. Range: about −2.5 to 2.5. From Xu et al., "ImageReward: Learning and Evaluating Human
Preferences for Text-to-Image Generation" (2023). Default weights: zai-org/ImageReward (Apache-2.0);
tokenizer: google-bert/bert-base-uncased (Apache-2.0).

The architecture is tested against Transformers' BLIP with random weights under the published names.
The published weights themselves were not at hand when it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.blip import BLIP, BLIPConfig
from diffusion_grpo.models.preprocess import ImageProcessorConfig, clip_preprocess
from diffusion_grpo.pretrained import local_directory
from diffusion_grpo.reward import on_device, reward_factory
from diffusion_grpo.score_head import Head, apply_head, score_head
from diffusion_grpo.tensors import load_tensors
from diffusion_grpo.weights import read_weights, weights_file

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
# Projections of BLIP's pretraining, which no score depends on.
_UNUSED = re.compile(r"(vision|text)_proj\.")


@reward_factory
def image_reward(
    model: str = "zai-org/ImageReward/ImageReward.pt",
    tokenizer: str = "google-bert/bert-base-uncased",
    heads: str = "16,12",
    batch_size: int = 16,
) -> Callable[..., jax.Array]:
    """Build the reward.

    Args:
        model: the weights: a path, or owner/name/file of the hub.
        tokenizer: a folder or a hub id with BERT's tokenizer.
        heads: attention heads of the image and of the text encoder, which weights do not tell.
        batch_size: images scored at once; lower it to save memory.

    Returns:
        A reward of device images.

    Raises:
        UsageError: a bad option, or weights that cannot be used.
    """
    if batch_size < 1:
        raise UsageError(
            f"image_reward.batch_size = {batch_size} is too small; expected at least 1"
        )
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*", heads):
        raise UsageError(f"image_reward.heads = {heads!r}; expected two numbers such as '16,12'")
    vision_heads, text_heads = map(int, heads.split(","))
    file = weights_file(model)
    blip, config, head = _load(read_weights(file), (vision_heads, text_heads), str(file))
    words = _tokenizer(tokenizer)
    size = config.image_size
    processor = ImageProcessorConfig(size=size, crop_size=(size, size))
    graphdef, weights = nnx.split(blip)
    compiled = jax.jit(partial(_score, graphdef, processor, head))

    @on_device
    def reward(images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]) -> jax.Array:
        """Score float32 images [B, H, W, 3] in [0, 1]; returns float32 [B]."""
        tokens = words(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS)
        ids = np.asarray(tokens["input_ids"], np.int32)
        mask = np.asarray(tokens["attention_mask"], bool)
        count = len(prompts)
        chunk = min(count, batch_size)
        # Whole chunks of one size compile once.
        rows = np.minimum(np.arange(-(-count // chunk) * chunk), count - 1).reshape(-1, chunk)
        scores = [compiled(weights, images[part], ids[part], mask[part]) for part in rows]
        return jnp.concatenate(scores)[:count]

    reward.batch_size = batch_size  # so that no more of the images are made floats at once
    return reward


def _load(
    tensors: dict[str, np.ndarray], heads: tuple[int, int], source: str
) -> tuple[BLIP, BLIPConfig, Head]:
    """Build BLIP and the head from the published tensors, strictly."""
    parts: dict[str, dict[str, np.ndarray]] = {"blip": {}, "mlp": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UsageError(f"{source}: unexpected tensor {name!r} for ImageReward")
        if not _UNUSED.match(rest):
            parts[part][rest] = tensor
    config = BLIPConfig.of_tensors(parts["blip"], heads=heads, source=source)
    module = load_tensors(BLIP, config, parts["blip"], source=source)
    return module, config, score_head(parts["mlp"], source=source)


def _tokenizer(name: str) -> Any:
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(local_directory(name, layout="processor"))


def _score(
    graphdef: Any,
    processor: ImageProcessorConfig,
    head: Head,
    weights: Any,
    images: jax.Array,
    input_ids: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    blip = nnx.merge(graphdef, weights)
    state = blip(clip_preprocess(images, processor), input_ids, mask)
    return (apply_head(head, state) - MEAN) / STD
