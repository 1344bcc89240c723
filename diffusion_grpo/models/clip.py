"""CLIP's text and vision towers (Radford et al. 2021), named as in Transformers.

Every attribute carries the name of the parameter in a Transformers checkpoint, so that loading is a
renaming of leaves. PyTorch's implementation is the reference for the numerics: layer norms and
softmax are computed in float32, activations are exactly the ones that the config names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip_layers import CLIPEncoder, LayerNorm, checked_int, embed

# Transformers kept a wrong eos_token_id in the configs of the original checkpoints: with this value
# the end of the text is the largest id of the sequence, which is what OpenAI's CLIP does.
LEGACY_EOS_TOKEN_ID = 2


class CLIPTextOutput(NamedTuple):
    """What the text tower returns.

    Attributes:
        last_hidden_state: `[B, n, d]`, after the final layer norm.
        pooled: its row at the end-of-text token, `[B, d]`, projected where the class says so.
        hidden_states: the embeddings and the output of each layer, `[B, n, d]` each, before the
            final layer norm (`hidden_states[-2]` is the penultimate layer).
    """

    last_hidden_state: Float[Array, "B n d"]
    pooled: Float[Array, "B d"]
    hidden_states: tuple[Array, ...]


class CLIPVisionOutput(NamedTuple):
    """What the vision tower returns.

    Attributes:
        last_hidden_state: `[B, n, d]`, the output of the last layer, class token first.
        pooled: `[B, d]`, the class token after the last layer norm.
        hidden_states: the normalized embeddings and the output of each layer, `[B, n, d]` each.
    """

    last_hidden_state: Float[Array, "B n d"]
    pooled: Float[Array, "B d"]
    hidden_states: tuple[Array, ...]


class CLIPTextEmbeddings(nnx.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: Any, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Build it from a `CLIPTextConfig`."""
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        std, width = 0.02 * config.initializer_factor, config.hidden_size
        self.max_position_embeddings = checked_int(config, "max_position_embeddings")
        vocab_size = checked_int(config, "vocab_size")
        self.token_embedding = embed(vocab_size, width, std, **kinds)
        self.position_embedding = embed(self.max_position_embeddings, width, std, **kinds)

    def __call__(self, input_ids: Int[Array, "B n"]) -> Float[Array, "B n d"]:
        """Embed token ids."""
        tokens = input_ids.shape[1]
        if tokens > self.max_position_embeddings:
            raise UsageError(
                f"input_ids of {tokens} tokens are too long: the text encoder has "
                f"max_position_embeddings = {self.max_position_embeddings}; truncate the prompt"
            )
        positions = self.position_embedding(jnp.arange(tokens)[None])
        return self.token_embedding(input_ids) + positions


class CLIPTextModel(nnx.Module):
    """CLIP's text tower: a causal transformer over token ids.

    Args:
        config: transformers' `CLIPTextConfig`.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
        gradient_checkpointing: recompute each layer in the backward pass.
        rngs: initializes the parameters, with the standard deviations that Transformers uses.

    Raises:
        UsageError: an activation or a field's type that is not supported.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        gradient_checkpointing: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the tower with random parameters."""
        self.eos_token_id = checked_int(config, "eos_token_id")
        self.embeddings = CLIPTextEmbeddings(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.encoder = CLIPEncoder(
            config,
            causal=True,
            dtype=dtype,
            param_dtype=param_dtype,
            gradient_checkpointing=gradient_checkpointing,
            rngs=rngs,
        )
        self.final_layer_norm = LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "B n"]) -> CLIPTextOutput:
        """Encode token ids `[B, n]`, n at most `max_position_embeddings`, padded as one likes.

        Attention is causal, so padding after the end-of-text token changes neither the pooled
        output nor the states up to that token; no padding mask is applied, as in Stable Diffusion.
        """
        hidden_states = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(hidden_states[-1])
        if self.eos_token_id == LEGACY_EOS_TOKEN_ID:
            end = jnp.argmax(input_ids, axis=1)
        else:
            end = jnp.argmax(input_ids == self.eos_token_id, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, pooled, hidden_states)


class CLIPTextModelWithProjection(nnx.Module):
    """The text tower, its pooled output projected: SDXL's second text encoder.

    The arguments are those of `CLIPTextModel`; the config's `projection_dim` is the width.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        gradient_checkpointing: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the tower and its projection with random parameters."""
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.text_model = CLIPTextModel(
            config, gradient_checkpointing=gradient_checkpointing, **kinds
        )
        self.text_projection = nnx.Linear(
            config.hidden_size,
            checked_int(config, "projection_dim"),
            use_bias=False,
            kernel_init=nnx.initializers.normal(
                config.initializer_factor * config.hidden_size**-0.5
            ),
            **kinds,
        )

    def __call__(self, input_ids: Int[Array, "B n"]) -> CLIPTextOutput:
        """Encode token ids; `pooled` is `[B, projection_dim]`, projected but not normalized."""
        output = self.text_model(input_ids)
        return output._replace(pooled=self.text_projection(output.pooled))


class CLIPVisionEmbeddings(nnx.Module):
    """Class token and patch embeddings, plus learned position embedding."""

    def __init__(self, config: Any, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Build it from a `CLIPVisionConfig`."""
        width, factor = config.hidden_size, config.initializer_factor
        self.image_size = checked_int(config, "image_size")
        patch_size = checked_int(config, "patch_size")
        std = config.initializer_range * factor
        self.class_embedding = nnx.Param(
            nnx.initializers.normal(factor * width**-0.5)(rngs.params(), (width,), param_dtype)
        )
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            width,
            (patch_size, patch_size),
            strides=patch_size,
            padding="VALID",
            use_bias=False,
            kernel_init=nnx.initializers.normal(std),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.num_positions = (self.image_size // patch_size) ** 2 + 1
        self.position_embedding = embed(
            self.num_positions, width, std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, pixel_values: Float[Array, "B H W c"]) -> Float[Array, "B n d"]:
        """Embed normalized images, class token first, patches in reading order."""
        batch, height, width, _ = pixel_values.shape
        if (height, width) != (self.image_size, self.image_size):
            raise UsageError(
                f"pixel_values of {height}x{width} pixels do not fit CLIP's image_size = "
                f"{self.image_size}; preprocess with a crop_size of {self.image_size}"
            )
        patches = self.patch_embedding(pixel_values)
        patches = patches.reshape(batch, -1, patches.shape[-1])
        class_token = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype)[None, None],
            (batch, 1, patches.shape[-1]),
        )
        tokens = jnp.concatenate([class_token, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(self.num_positions)[None])


class CLIPVisionModel(nnx.Module):
    """CLIP's vision tower: a vision transformer over normalized NHWC images.

    The arguments are those of `CLIPTextModel`, with transformers' `CLIPVisionConfig`.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        gradient_checkpointing: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the tower with random parameters."""
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.embeddings = CLIPVisionEmbeddings(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        # The misspelt name is the checkpoints'.
        self.pre_layrnorm = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)
        self.encoder = CLIPEncoder(
            config,
            causal=False,
            dtype=dtype,
            param_dtype=param_dtype,
            gradient_checkpointing=gradient_checkpointing,
            rngs=rngs,
        )
        self.post_layernorm = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "B H W c"]) -> CLIPVisionOutput:
        """Encode images `[B, image_size, image_size, c]`, normalized with CLIP's mean and std."""
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        last = hidden_states[-1]
        return CLIPVisionOutput(last, self.post_layernorm(last[:, 0]), hidden_states)


class CLIPModel(nnx.Module):
    """Both towers with their projections into one space, and the learned logit scale.

    Args:
        config: transformers' `CLIPConfig`.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
        gradient_checkpointing: recompute each layer in the backward pass.
        rngs: initializes the parameters.

    Raises:
        UsageError: an activation or a field's type that is not supported.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        gradient_checkpointing: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Build both towers with random parameters."""
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        text, vision, factor = config.text_config, config.vision_config, config.initializer_factor
        self.text_model = CLIPTextModel(
            text, gradient_checkpointing=gradient_checkpointing, **kinds
        )
        self.vision_model = CLIPVisionModel(
            vision, gradient_checkpointing=gradient_checkpointing, **kinds
        )

        def projection(width: int) -> nnx.Linear:
            init = nnx.initializers.normal(factor * width**-0.5)
            return nnx.Linear(
                width, config.projection_dim, use_bias=False, kernel_init=init, **kinds
            )

        self.visual_projection = projection(vision.hidden_size)
        self.text_projection = projection(text.hidden_size)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, param_dtype))

    def get_text_features(self, input_ids: Int[Array, "B n"]) -> Float[Array, "B d"]:
        """Return the projected text embeddings `[B, projection_dim]`, not normalized."""
        return self.text_projection(self.text_model(input_ids).pooled)

    def get_image_features(self, pixel_values: Float[Array, "B H W c"]) -> Float[Array, "B d"]:
        """Return the projected image embeddings `[B, projection_dim]`, not normalized."""
        return self.visual_projection(self.vision_model(pixel_values).pooled)

    def __call__(
        self, input_ids: Int[Array, "Q n"], pixel_values: Float[Array, "B H W c"]
    ) -> Float[Array, "B Q"]:
        """Return CLIP's logits: exp(logit_scale) times the cosine of each image with each text."""
        image = normalize_features(self.get_image_features(pixel_values))
        text = normalize_features(self.get_text_features(input_ids))
        return jnp.exp(self.logit_scale[...].astype(jnp.float32)) * (image @ text.T)


def normalize_features(features: Float[Array, "B d"]) -> Float[Array, "B d"]:
    """Return the rows divided by their Euclidean norm, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
