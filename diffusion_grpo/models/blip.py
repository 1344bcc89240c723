"""BLIP's image encoder and its text encoder with cross-attention to the image (Li et al. 2022).

Every attribute carries the name of the parameter in the checkpoints that BLIP's authors and those
built on it publish, so that loading is a renaming of leaves. Inference only: no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip_layers import LayerNorm


@dataclass(frozen=True)
class BLIPConfig:
    """The sizes of both encoders.

    Attributes:
        image_size: the side of the images, in pixels.
        patch_size: the side of a patch, in pixels.
        vision_width: of the image encoder.
        vision_layers: of the image encoder.
        vision_heads: attention heads of the image encoder.
        vision_inner: width of its MLPs.
        vocab_size: of the text encoder.
        positions: the longest text, in tokens.
        text_width: of the text encoder.
        text_layers: of the text encoder.
        text_heads: attention heads of the text encoder.
        text_inner: width of its MLPs.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_inner: int
    vocab_size: int
    positions: int
    text_width: int
    text_layers: int
    text_heads: int
    text_inner: int

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, np.ndarray], *, heads: tuple[int, int], source: str
    ) -> BLIPConfig:
        """Read the sizes off a checkpoint's tensors.

        Args:
            tensors: by name.
            heads: attention heads of the image and of the text encoder, which no shape tells.
            source: where they come from, for messages.

        Raises:
            UsageError: a tensor is missing, which is named, or the heads do not divide a width.
        """
        block, layer = "visual_encoder.blocks.", "text_encoder.encoder.layer."

        def shape(name: str) -> tuple[int, ...]:
            if name not in tensors:
                raise UsageError(f"{source}: the tensor {name!r} is missing; is it a BLIP model?")
            return tensors[name].shape

        def count(prefix: str) -> int:
            inside = (name for name in tensors if name.startswith(prefix))
            return len({name[len(prefix) :].partition(".")[0] for name in inside})

        vision_width, _, patch_size, _ = shape("visual_encoder.patch_embed.proj.weight")
        vocab_size, text_width = shape("text_encoder.embeddings.word_embeddings.weight")
        for width, number in ((vision_width, heads[0]), (text_width, heads[1])):
            if width % number:
                raise UsageError(f"{source}: {number} heads do not divide a width of {width}")
        patches = shape("visual_encoder.pos_embed")[1] - 1
        return cls(
            image_size=patch_size * round(patches**0.5),
            patch_size=patch_size,
            vision_width=vision_width,
            vision_layers=count(block),
            vision_heads=heads[0],
            vision_inner=shape(f"{block}0.mlp.fc1.weight")[0],
            vocab_size=vocab_size,
            positions=shape("text_encoder.embeddings.position_embeddings.weight")[0],
            text_width=text_width,
            text_layers=count(layer),
            text_heads=heads[1],
            text_inner=shape(f"{layer}0.intermediate.dense.weight")[0],
        )


def _attend(
    query: Float[Array, "B n d"],
    key: Float[Array, "B m d"],
    value: Float[Array, "B m d"],
    heads: int,
    mask: Bool[Array, "B m"] | None = None,
) -> Float[Array, "B n d"]:
    """Return softmax(q kᵀ / √head_dim) v, head by head; a key whose mask is false is not seen."""

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:2], heads, -1)

    seen = None if mask is None else mask[:, None, None, :]
    out = jax.nn.dot_product_attention(split(query), split(key), split(value), mask=seen)
    return out.reshape(query.shape)


class VisionAttention(nnx.Module):
    """Self-attention with one matrix for query, key and value."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Attend within each image."""
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        return self.proj(_attend(query, key, value, self.heads))


class VisionMLP(nnx.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.fc1 = nnx.Linear(width, inner, rngs=rngs)
        self.fc2 = nnx.Linear(inner, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Return fc2(gelu(fc1(x)))."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionBlock(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        width = config.vision_width
        norm = {"epsilon": 1e-6, "param_dtype": jnp.float32, "rngs": rngs}
        self.norm1 = LayerNorm(width, **norm)
        self.attn = VisionAttention(width, config.vision_heads, rngs=rngs)
        self.norm2 = LayerNorm(width, **norm)
        self.mlp = VisionMLP(width, config.vision_inner, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Return x + attention, then + MLP, each of the normalized input."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """A linear map of each patch."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        size = config.patch_size
        self.proj = nnx.Conv(
            3, config.vision_width, (size, size), strides=size, padding="VALID", rngs=rngs
        )


class VisionTransformer(nnx.Module):
    """The image encoder."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        width, patches = config.vision_width, (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.pos_embed = nnx.Param(jnp.zeros((1, patches + 1, width)))
        self.blocks = nnx.List(
            [VisionBlock(config, rngs=rngs) for _ in range(config.vision_layers)]
        )
        self.norm = LayerNorm(width, epsilon=1e-6, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B n d"]:
        """Encode normalized images, class token first, patches in reading order."""
        patches = self.patch_embed.proj(pixel_values)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        token = jnp.broadcast_to(self.cls_token[...], (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([token, patches], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextSelfAttention(nnx.Module):
    """The projections of an attention layer."""

    def __init__(self, width: int, seen: int, *, rngs: nnx.Rngs) -> None:
        """Build it; `seen` is the width of what is attended to."""
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(seen, width, rngs=rngs)
        self.value = nnx.Linear(seen, width, rngs=rngs)


class TextOutput(nnx.Module):
    """A linear layer, added to what came before, normalized."""

    def __init__(self, inner: int, width: int, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.dense = nnx.Linear(inner, width, rngs=rngs)
        self.LayerNorm = LayerNorm(width, epsilon=1e-12, param_dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B n i"], before: Float[Array, "B n d"]
    ) -> Float[Array, "B n d"]:
        """Return norm(dense(x) + before)."""
        return self.LayerNorm(self.dense(x) + before)


class TextAttention(nnx.Module):
    """Attention of a text to itself or to an image, post-norm."""

    def __init__(self, config: BLIPConfig, seen: int, *, rngs: nnx.Rngs) -> None:
        """Build it; `seen` is the width of what is attended to."""
        self.heads = config.text_heads
        self.self = TextSelfAttention(config.text_width, seen, rngs=rngs)
        self.output = TextOutput(config.text_width, config.text_width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B n d"],
        seen: Float[Array, "B m e"],
        mask: Bool[Array, "B m"] | None = None,
    ) -> Float[Array, "B n d"]:
        """Attend from `x` to `seen`."""
        of = self.self
        out = _attend(of.query(x), of.key(seen), of.value(seen), self.heads, mask)
        return self.output(out, x)


class TextIntermediate(nnx.Module):
    """The first layer of an MLP."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.dense = nnx.Linear(config.text_width, config.text_inner, rngs=rngs)


class TextLayer(nnx.Module):
    """Self-attention, cross-attention to the image, MLP."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.attention = TextAttention(config, config.text_width, rngs=rngs)
        self.crossattention = TextAttention(config, config.vision_width, rngs=rngs)
        self.intermediate = TextIntermediate(config, rngs=rngs)
        self.output = TextOutput(config.text_inner, config.text_width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B n d"], mask: Bool[Array, "B n"], image: Float[Array, "B m e"]
    ) -> Float[Array, "B n d"]:
        """Apply the three in turn."""
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image)
        inner = jax.nn.gelu(self.intermediate.dense(x), approximate=False)
        return self.output(inner, x)


class TextEmbeddings(nnx.Module):
    """Token embedding plus position embedding, normalized."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        width = config.text_width
        self.word_embeddings = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.positions, width, rngs=rngs)
        self.LayerNorm = LayerNorm(width, epsilon=1e-12, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "B n"]) -> Float[Array, "B n d"]:
        """Embed token ids."""
        positions = self.position_embeddings(jnp.arange(input_ids.shape[1])[None])
        return self.LayerNorm(self.word_embeddings(input_ids) + positions)


class TextLayers(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.layer = nnx.List([TextLayer(config, rngs=rngs) for _ in range(config.text_layers)])


class TextEncoder(nnx.Module):
    """BERT with cross-attention to an image in every layer."""

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it."""
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = TextLayers(config, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B n"],
        mask: Bool[Array, "B n"],
        image: Float[Array, "B m e"],
    ) -> Float[Array, "B n d"]:
        """Encode token ids, of which those that are padding have a false mask."""
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask, image)
        return x


class BLIP(nnx.Module):
    """Both encoders: what a text means in view of an image.

    Args:
        config: the sizes.
        rngs: initializes the parameters.
    """

    def __init__(self, config: BLIPConfig, *, rngs: nnx.Rngs) -> None:
        """Build it with random parameters."""
        self.visual_encoder = VisionTransformer(config, rngs=rngs)
        self.text_encoder = TextEncoder(config, rngs=rngs)

    def __call__(
        self,
        pixel_values: Float[Array, "B H W 3"],
        input_ids: Int[Array, "B n"],
        mask: Bool[Array, "B n"],
    ) -> Float[Array, "B d"]:
        """Return the state of the first token of each text, read beside its image."""
        image = self.visual_encoder(pixel_values)
        return self.text_encoder(input_ids, mask, image)[:, 0]
