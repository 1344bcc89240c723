"""What a UNet is conditioned on: prompts as the arguments that it takes beside the noisy latents.

A conditioning is a dictionary of the UNet's keyword arguments, each with one row an image: the text
encoders' hidden states, and for a UNet with `addition_embed_type = "text_time"` the pooled text
embedding and the sizes of the picture. Everything above handles it as a pytree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from diffusion_grpo.components import TextEncoder
from diffusion_grpo.errors import UsageError
from diffusion_grpo.mesh import by_rows, on_devices, replicated, shards
from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.pretrained import TIME_IDS, StableDiffusion
from diffusion_grpo.program_cache import shared_programs
from diffusion_grpo.text_encoding import ENCODERS, text_states, tower

CHUNK = 16  # prompts encoded at a time

Conditioning = dict[str, Array]  # keyword arguments of the UNet, [N, ...] each


def encode_prompts(
    model: StableDiffusion,
    texts: Sequence[str],
    *,
    negative_prompt: str = "",
    shape: tuple[int, int, int] | None = None,
    clip_skip: int = 0,
    tokens: bool = False,
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
        tokens: leave the encoding to the network, a `TextConditionedUNet`, and return what that is
            conditioned on.

    Returns:
        The conditioning of the prompts, `[N, ...]`, and of the negative prompt, `[1, ...]`.

    Raises:
        UsageError: one text in place of a list of them, or an encoder has too few layers for
            `clip_skip`.
    """
    if isinstance(texts, str):  # a sequence of its letters
        raise UsageError(f"texts is {texts!r}; expected a list of texts")
    distinct = list(dict.fromkeys([negative_prompt, *texts]))
    place = {text: i for i, text in enumerate(distinct)}
    rows = np.array([place[text] for text in texts], int)
    _warn_of_cuts(model, distinct)
    encoders = dict(zip(ENCODERS, model.encoders, strict=False))
    ids = {name: _tokens(*pair, distinct) for name, pair in encoders.items()}
    blank = model.zeros_for_empty_prompt and not negative_prompt
    texted = model.unet.config.addition_embed_type == "text_time"
    if tokens:
        prompts: Conditioning = {ENCODERS[name]: jnp.asarray(x[rows]) for name, x in ids.items()}
        negative: Conditioning = {ENCODERS[name]: jnp.asarray(x[:1]) for name, x in ids.items()}
        for side, is_prompt in ((prompts, True), (negative, False)):
            count = len(side["input_ids"])
            side["is_prompt"] = jnp.full(count, is_prompt)
            side["is_blank"] = jnp.full(count, blank and not is_prompt)
    else:
        found = [
            _encode(encoder, ids[name], clip_skip, penultimate=len(encoders) > 1)
            for name, (_, encoder) in encoders.items()
        ]
        hidden, plain, pooled = zip(*found, strict=True)
        prompts = {"encoder_hidden_states": jnp.concatenate(hidden, axis=-1)[rows]}
        negative = {"encoder_hidden_states": jnp.concatenate(plain, axis=-1)}
        if texted:
            prompts["text_embeds"], negative["text_embeds"] = pooled[-1][rows], pooled[-1][:1]
        if blank:
            negative = jax.tree.map(jnp.zeros_like, negative)
    if texted:
        sizes = _size_ids(model, shape)
        negative["time_ids"] = sizes
        prompts["time_ids"] = jnp.broadcast_to(sizes, (len(rows), sizes.shape[1]))
    return prompts, negative


def prompts_at_once(model: StableDiffusion, *, most: int = 4096, budget: int = 2**29) -> int:
    """Return how many prompts are encoded, and held on every device, at a time.

    Args:
        model: the pipeline.
        most: of a small one.
        budget: bytes, by float32 states; SDXL's take 0.6 MB a prompt.
    """
    tokens = _length(*model.encoders[0])
    shapes = conditioning_shapes(model.unet.config, 1, tokens, jnp.float32)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return min(most, max(1, budget // size))


def conditioning_shapes(
    unet: UNetConfig, count: int, tokens: int, dtype: Any, *, encoders: int = 0
) -> dict[str, Any]:
    """Return the shapes of a UNet's conditioning, for what is planned or measured without a prompt.

    Args:
        unet: the network's configuration.
        count: N, rows.
        tokens: n, the length of the text states.
        dtype: of the text encoders.
        encoders: how many text encoders the network runs itself, given tokens; see
            `encode_prompts`.
    """
    if encoders:
        ids = jax.ShapeDtypeStruct((count, tokens), jnp.int32)
        shapes = dict.fromkeys(list(ENCODERS.values())[:encoders], ids)
        flags = dict.fromkeys(("is_prompt", "is_blank"), jax.ShapeDtypeStruct((count,), jnp.bool_))
        shapes |= flags
        if unet.addition_embed_type == "text_time":
            shapes["time_ids"] = jax.ShapeDtypeStruct((count, TIME_IDS), jnp.float32)
        return shapes
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


def every(prompts: Conditioning, count: int) -> Conditioning:
    """Return the conditioning of every `count`-th image: one a prompt, if `count` share it.

    By a reshape, and not by a strided slice: images that are divided over devices stay there.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, 0], prompts)


def _size_ids(model: StableDiffusion, shape: tuple[int, int, int] | None) -> Array:
    factor = model.vae.config.downscale_factor
    height, width = model.image_size if shape is None else (factor * shape[0], factor * shape[1])
    return jnp.asarray([[height, width, 0, 0, height, width]], jnp.float32)


def _tokens(tokenizer: Any, encoder: TextEncoder, texts: list[str]) -> Int[np.ndarray, "N n"]:
    length = _length(tokenizer, encoder)
    words = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    return np.asarray(words["input_ids"], np.int32)


def _encode(
    encoder: TextEncoder, ids: Int[np.ndarray, "N n"], clip_skip: int, *, penultimate: bool
) -> tuple[Array, Array, Array]:
    """Return hidden states `[N, n, d]`, those of the first text without skip, and pooled ones."""
    chunk = math.lcm(CHUNK, shards())
    padded = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % chunk, axis=0)])
    graphdef, weights = nnx.split(encoder)
    weights = on_devices(weights)
    encode = _encoder(graphdef, clip_skip, penultimate=penultimate)
    starts = range(0, len(padded), chunk)
    parts = [replicated(encode(weights, padded[i : i + chunk])) for i in starts]
    hidden, plain, pooled = zip(*parts, strict=True)
    return jnp.concatenate(hidden), plain[0], jnp.concatenate(pooled)


@shared_programs
def _encoder(graphdef: Any, clip_skip: int, *, penultimate: bool) -> Callable[..., Any]:
    @jax.jit
    def encode(weights: Any, ids: Array) -> tuple[Array, Array, Array]:
        both, pooled = text_states(
            nnx.merge(graphdef, weights), by_rows(ids), (clip_skip, 0), penultimate=penultimate
        )
        return both[0], both[1][:1], pooled

    return encode


def _length(tokenizer: Any, encoder: TextEncoder) -> int:
    """Return how many tokens are read; a tokenizer's own limit may be missing from its files."""
    return min(tokenizer.model_max_length, tower(encoder).embeddings.max_position_embeddings)


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
