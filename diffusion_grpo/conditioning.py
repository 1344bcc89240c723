"""What a UNet is conditioned on: prompts as the arguments that it takes beside the noisy latents.

A conditioning is a dictionary of the UNet's keyword arguments, each with one row an image: the text
encoders' hidden states, and for a UNet with `addition_embed_type = "text_time"` the pooled text
embedding and the sizes of the picture. Everything above handles it as a pytree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from diffusion_grpo.components import TextEncoder
from diffusion_grpo.errors import UsageError
from diffusion_grpo.mesh import by_rows, on_devices, replicated, shards
from diffusion_grpo.models.clip import CLIPTextModel
from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.pretrained import TIME_IDS, StableDiffusion

CHUNK = 16  # prompts encoded at a time

Conditioning = dict[str, Array]  # keyword arguments of the UNet, [N, ...] each


def encode_prompts(
    model: StableDiffusion,
    texts: Sequence[str],
    *,
    negative_prompt: str = "",
    shape: tuple[int, int, int] | None = None,
    clip_skip: int = 0,
) -> tuple[Conditioning, Conditioning]:
    """Encode prompts with the pipeline's text encoders, each distinct text once.

    As in Diffusers: a lone text encoder gives its last hidden states after the final layer norm;
    two give their penultimate ones, unnormalized and side by side, and the second its projected
    end-of-text state. Where the checkpoint says so, no negative prompt means zeros. The size ids
    are those of a whole picture: its size, no crop, its size.

    The encoders' parameters are on the device only for the length of this call, if they are in the
    host's memory.

    Args:
        model: the pipeline.
        texts: N prompts; longer ones than the text encoder reads are cut, with one warning.
        negative_prompt: text of the unconditional half of the guidance.
        shape: (h, w, c) of the latents, for the size ids; default the checkpoint's.
        clip_skip: how many layers before the usual one the prompts' hidden states are taken; the
            negative prompt's are the usual ones, as Diffusers has it.

    Returns:
        The conditioning of the prompts, `[N, ...]`, and of the negative prompt, `[1, ...]`.

    Raises:
        UsageError: an encoder has too few layers for `clip_skip`.
    """
    distinct = list(dict.fromkeys([negative_prompt, *texts]))
    place = {text: i for i, text in enumerate(distinct)}
    rows = np.array([place[text] for text in texts], int)
    hidden, plain, pooled = [], [], []
    _warn_of_cuts(model, distinct)
    for tokenizer, encoder in model.encoders:
        penultimate = len(model.encoders) > 1
        found = _encode(tokenizer, encoder, distinct, clip_skip, penultimate)
        hidden.append(found[0])
        plain.append(found[1])
        pooled.append(found[2])
    prompts: Conditioning = {"encoder_hidden_states": jnp.concatenate(hidden, axis=-1)[rows]}
    negative: Conditioning = {"encoder_hidden_states": jnp.concatenate(plain, axis=-1)}
    texted = model.unet.config.addition_embed_type == "text_time"
    if texted:
        prompts["text_embeds"], negative["text_embeds"] = pooled[-1][rows], pooled[-1][:1]
    if model.zeros_for_empty_prompt and not negative_prompt:
        negative = jax.tree.map(jnp.zeros_like, negative)
    if texted:
        ids = _size_ids(model, shape)
        negative["time_ids"] = ids
        prompts["time_ids"] = jnp.broadcast_to(ids, (len(rows), ids.shape[1]))
    return prompts, negative


def conditioning_shapes(unet: UNetConfig, count: int, tokens: int, dtype: Any) -> dict[str, Any]:
    """Return the shapes of a UNet's conditioning, for what is planned or measured without a prompt.

    Args:
        unet: the network's configuration.
        count: N, rows.
        tokens: n, the length of the text states.
        dtype: of the text encoders.
    """
    width = unet.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    shapes = {"encoder_hidden_states": jax.ShapeDtypeStruct((count, tokens, width), dtype)}
    if unet.addition_embed_type == "text_time":
        embedded = unet.addition_time_embed_dim
        total = unet.projection_class_embeddings_input_dim
        assert embedded is not None and total is not None
        pooled = total - TIME_IDS * embedded
        shapes["text_embeds"] = jax.ShapeDtypeStruct((count, pooled), dtype)
        shapes["time_ids"] = jax.ShapeDtypeStruct((count, TIME_IDS), jnp.float32)
    return shapes


def of_rows(conditioning: tuple[Any, Any], rows: Any) -> tuple[Any, Any]:
    """Return the conditioning of some images: their prompts, and the negative one of all."""
    return jax.tree.map(lambda leaf: leaf[rows], conditioning[0]), conditioning[1]


def by_rows_of(conditioning: tuple[Any, Any], rows: Any) -> tuple[Any, Any]:
    """Return the conditioning of some images, divided over the devices as the images are."""
    prompts, negative = of_rows(conditioning, rows)
    return by_rows(prompts), negative


def _size_ids(model: StableDiffusion, shape: tuple[int, int, int] | None) -> Array:
    factor = model.vae.config.downscale_factor
    height, width = model.image_size if shape is None else (factor * shape[0], factor * shape[1])
    return jnp.asarray([[height, width, 0, 0, height, width]], jnp.float32)


def _encode(
    tokenizer: Any, encoder: TextEncoder, texts: list[str], clip_skip: int, penultimate: bool
) -> tuple[Array, Array, Array]:
    """Return hidden states `[N, n, d]`, those of the first text without skip, and pooled ones."""
    length = _length(tokenizer, encoder)
    chunk = math.lcm(CHUNK, shards())
    padded = texts + [""] * (-len(texts) % chunk)
    words = tokenizer(padded, padding="max_length", truncation=True, max_length=length)
    ids = np.asarray(words["input_ids"], np.int32)
    graphdef, weights = nnx.split(encoder)
    weights = on_devices(weights)

    def states(encoder: TextEncoder, layers: tuple[Array, ...], skip: int) -> Array:
        last = len(layers) - 1 - skip - penultimate  # layers[0] are the embeddings
        if last < 1:
            raise UsageError(
                f"clip_skip is {skip}, but a text encoder has {len(layers) - 1} layers; expected "
                f"at most {len(layers) - 2 - penultimate}"
            )
        return layers[last] if penultimate else _tower(encoder).final_layer_norm(layers[last])

    @jax.jit
    def encode(weights: Any, ids: Array) -> tuple[Array, Array, Array]:
        encoder = nnx.merge(graphdef, weights)
        output = encoder(by_rows(ids))
        layers = output.hidden_states
        both = (states(encoder, layers, skip) for skip in (clip_skip, 0))
        skipped, plain = both
        return skipped, plain[:1], output.pooled

    parts = [replicated(encode(weights, ids[i : i + chunk])) for i in range(0, len(ids), chunk)]
    hidden, plain, pooled = zip(*parts, strict=True)
    return jnp.concatenate(hidden), plain[0], jnp.concatenate(pooled)


def _tower(encoder: TextEncoder) -> CLIPTextModel:
    return encoder if isinstance(encoder, CLIPTextModel) else encoder.text_model


def _length(tokenizer: Any, encoder: TextEncoder) -> int:
    """Return how many tokens are read; a tokenizer's own limit may be missing from its files."""
    return min(tokenizer.model_max_length, _tower(encoder).embeddings.max_position_embeddings)


def _warn_of_cuts(model: StableDiffusion, texts: Sequence[str]) -> None:
    longest, size, length = "", 0, 0
    for tokenizer, encoder in model.encoders:
        most = _length(tokenizer, encoder)
        for text in texts:
            count = len(tokenizer(text, verbose=False)["input_ids"])
            if count > max(size, most):
                longest, size, length = text, count, most
    if size:
        warnings.warn(
            f"a prompt of {size} tokens is cut to the {length} that the text encoder reads: "
            f"{longest!r}",
            stacklevel=3,
        )
