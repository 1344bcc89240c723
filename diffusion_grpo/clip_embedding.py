"""Embeddings of images and prompts by a CLIP checkpoint, for the rewards that are built on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip import CLIPModel, normalize_features
from diffusion_grpo.models.preprocess import ImageProcessorConfig, clip_preprocess
from diffusion_grpo.pretrained import load_clip
from diffusion_grpo.program_cache import shared_programs

# Prompts are encoded once each, in padded chunks of this many: the text tower compiles once.
PROMPTS_AT_ONCE = 16


class CLIPEmbedder:
    """A CLIP model that embeds images and prompts in one space, on the accelerator.

    Attributes:
        model: both towers.
        tokenizer: transformers' CLIPTokenizer.
        processor: how the checkpoint wants its images.
        images_at_once: images embedded at once.
        width: d of the embeddings.
        logit_scale: exp of the checkpoint's `logit_scale`: what its cosines are multiplied by.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        processor: ImageProcessorConfig,
        *,
        images_at_once: int = 32,
        preprocess: Callable[..., Array] = clip_preprocess,
    ) -> None:
        """Split the model: its structure is compiled in, its weights are an argument.

        Args:
            model: both towers.
            tokenizer: transformers' CLIPTokenizer.
            processor: how the checkpoint wants its images.
            images_at_once: images embedded at once; lower it to save memory.
            preprocess: float32 images [b, H, W, 3] in [0, 1] and `processor` to pixel values.
        """
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.images_at_once = images_at_once
        self.max_tokens = min(
            tokenizer.model_max_length, model.text_model.embeddings.max_position_embeddings
        )
        self.width = model.visual_projection.out_features
        self.logit_scale = float(np.exp(np.asarray(model.logit_scale[...], np.float64)))
        self._texts: dict[str, np.ndarray] = {}
        self._warned = False
        graphdef, self.weights = nnx.split(model)
        self._encode_text = _text_encoder(graphdef)
        self._encode_images = _image_encoder(graphdef, processor, preprocess)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        model: str,
        batch_size: int,
        *,
        processor: str | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
        **options: Any,
    ) -> CLIPEmbedder:
        """Load a checkpoint for a reward.

        Args:
            name: the reward, for messages.
            model: a folder or a hub id with a Transformers CLIPModel checkpoint.
            batch_size: images embedded at once.
            processor: as in `load_clip`.
            tensors: as in `load_clip`.
            **options: further arguments of `CLIPEmbedder`.

        Raises:
            UsageError: the batch size is below 1, or the checkpoint cannot be used.
        """
        if batch_size < 1:
            raise UsageError(f"{name}.batch_size = {batch_size} is too small; expected at least 1")
        network, tokenizer, image_processor = load_clip(model, processor=processor, tensors=tensors)
        config = ImageProcessorConfig.from_dict(image_processor)
        return cls(network, tokenizer, config, images_at_once=batch_size, **options)

    def images(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B d"]:
        """Return the normalized embeddings of images in [0, 1], float32."""
        count = len(images)
        chunk = min(count, self.images_at_once)
        # Whole chunks of one size compile once.
        padded = jnp.pad(images, ((0, -count % chunk), (0, 0), (0, 0), (0, 0)))
        parts = [
            self._encode_images(self.weights, padded[i : i + chunk]) for i in range(0, count, chunk)
        ]
        return jnp.concatenate(parts)[:count]

    def prompts(self, prompts: list[str]) -> Float[np.ndarray, "B d"]:
        """Return the normalized embeddings of prompts, each computed once, float32."""
        new = sorted(set(prompts) - self._texts.keys())
        for i in range(0, len(new), PROMPTS_AT_ONCE):
            chunk = new[i : i + PROMPTS_AT_ONCE]
            padded = chunk + [""] * (PROMPTS_AT_ONCE - len(chunk))
            features = np.asarray(self._encode_text(self.weights, self._tokenize(padded)))
            self._texts.update(zip(chunk, features, strict=False))
        return np.stack([self._texts[prompt] for prompt in prompts])

    def cosine(self, images: Float[Array, "B H W 3"], prompts: list[str]) -> Float[Array, " B"]:
        """Return the cosine of each image's embedding with its prompt's, float32."""
        return jnp.sum(self.images(images) * self.prompts(prompts), axis=-1)

    def _tokenize(self, prompts: list[str]) -> np.ndarray:
        """Return token ids [B, n], padded or cut to the tower's length; warn of a first cut."""
        for prompt in prompts:
            length = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            if length > self.max_tokens and not self._warned:
                self._warned = True
                warnings.warn(
                    f"a prompt of {length} tokens is cut to the {self.max_tokens} that the CLIP "
                    f"reward reads, and later ones may be too: {prompt!r}",
                    stacklevel=5,
                )
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_tokens
        )
        return np.asarray(encoded["input_ids"], np.int32)


@shared_programs
def _text_encoder(graphdef: Any) -> Callable[..., Array]:
    @jax.jit
    def encode_text(weights: Any, input_ids: jax.Array) -> jax.Array:
        return normalize_features(nnx.merge(graphdef, weights).get_text_features(input_ids))

    return encode_text


@shared_programs
def _image_encoder(
    graphdef: Any, processor: ImageProcessorConfig, preprocess: Callable[..., Array]
) -> Callable[..., Array]:
    @jax.jit
    def encode_images(weights: Any, images: jax.Array) -> jax.Array:
        pixel_values = preprocess(images, processor)
        return normalize_features(nnx.merge(graphdef, weights).get_image_features(pixel_values))

    return encode_images
