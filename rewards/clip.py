"""CLIP score: how well an image fits its prompt, by any CLIPModel checkpoint; on device."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip import normalize_features
from diffusion_grpo.models.preprocess import ImageProcessorConfig, clip_preprocess
from diffusion_grpo.pretrained import load_clip
from diffusion_grpo.reward import reward_factory

# Prompts are encoded once each, in padded chunks of this many: the text tower compiles once.
PROMPTS_AT_ONCE = 16


@reward_factory
def clip(
    model: str = "openai/clip-vit-large-patch14",
    scale: Literal["cosine", "logit"] = "cosine",
    batch_size: int = 32,
) -> CLIPReward:
    """CLIP score: the cosine of the image's and the prompt's embedding (Radford et al. 2021).

    r = ⟨f(image), g(prompt)⟩ / (‖f(image)‖ ‖g(prompt)‖), in [−1, 1]; with `scale="logit"`,
    that times exp(logit_scale), which is 100 for OpenAI's checkpoints.

    Args:
        model: a folder or a hub id with a Transformers CLIPModel checkpoint.
        scale: "cosine", or "logit" for CLIP's own logit.
        batch_size: images scored at once; lower it to save memory.

    Returns:
        The reward, which takes float32 device images [B, H, W, 3] in [0, 1].

    Raises:
        UsageError: a bad option, or a checkpoint that cannot be used.
    """
    if scale not in ("cosine", "logit"):
        raise UsageError(f"clip.scale = {scale!r} is not supported; expected 'cosine' or 'logit'")
    if batch_size < 1:
        raise UsageError(f"clip.batch_size = {batch_size} is too small; expected at least 1")
    network, tokenizer, processor = load_clip(model)
    return CLIPReward(
        network,
        tokenizer,
        ImageProcessorConfig.from_dict(processor),
        scale=scale,
        images_at_once=batch_size,
    )


class CLIPReward:
    """The CLIP score of images under their prompts."""

    on_device = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: ImageProcessorConfig,
        *,
        scale: str,
        images_at_once: int,
    ) -> None:
        """Split the model: its structure is compiled in, its weights are an argument."""
        self.images_at_once = images_at_once
        self.tokenizer = tokenizer
        self.max_tokens = min(
            tokenizer.model_max_length, model.text_model.embeddings.max_position_embeddings
        )
        self.text_features: dict[str, np.ndarray] = {}
        self.warned = False
        graphdef, self.weights = nnx.split(model)
        self._encode = jax.jit(partial(_encode, graphdef))
        self._score = jax.jit(partial(_score, graphdef, processor, scale == "logit"))

    def __call__(
        self, images: jax.Array, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> jax.Array:
        """Score float32 images [B, H, W, 3] in [0, 1] under B prompts; returns float32 [B]."""
        del metadata
        text = self._text_features(prompts)
        count = len(prompts)
        chunk = min(count, self.images_at_once)
        padding = -count % chunk
        # Whole chunks of one size compile once.
        images = jnp.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        text = np.pad(text, ((0, padding), (0, 0)))
        scores = [
            self._score(self.weights, images[i : i + chunk], text[i : i + chunk])
            for i in range(0, count, chunk)
        ]
        return jnp.concatenate(scores)[:count]

    def _text_features(self, prompts: list[str]) -> np.ndarray:
        """Return the normalized embeddings [B, d] of prompts, each computed once in a run."""
        new = sorted(set(prompts) - self.text_features.keys())
        for i in range(0, len(new), PROMPTS_AT_ONCE):
            chunk = new[i : i + PROMPTS_AT_ONCE]
            padded = chunk + [""] * (PROMPTS_AT_ONCE - len(chunk))
            features = np.asarray(self._encode(self.weights, self._tokenize(padded)))
            self.text_features.update(zip(chunk, features, strict=False))
        return np.stack([self.text_features[prompt] for prompt in prompts])

    def _tokenize(self, prompts: list[str]) -> np.ndarray:
        """Return token ids [B, n], padded or cut to the tower's length; warn of a first cut."""
        for prompt in prompts:
            length = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            if length > self.max_tokens and not self.warned:
                self.warned = True
                warnings.warn(
                    f"a prompt of {length} tokens is cut to the {self.max_tokens} that the CLIP "
                    f"reward reads, and later ones may be too: {prompt!r}",
                    stacklevel=4,
                )
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_tokens
        )
        return np.asarray(encoded["input_ids"], np.int32)


def _encode(graphdef: Any, weights: Any, input_ids: jax.Array) -> jax.Array:
    return normalize_features(nnx.merge(graphdef, weights).get_text_features(input_ids))


def _score(
    graphdef: Any,
    processor: ImageProcessorConfig,
    scaled: bool,
    weights: Any,
    images: jax.Array,
    text: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, weights)
    pixel_values = clip_preprocess(images, processor)
    image = normalize_features(model.get_image_features(pixel_values))
    cosine = jnp.sum(image * text, axis=-1)
    return jnp.exp(model.logit_scale[...].astype(jnp.float32)) * cosine if scaled else cosine
