"""Attention and the spatial transformer of the UNet, in NHWC layout.

Attribute names are those of Diffusers. PyTorch's Diffusers is the reference for the numerics:
softmax in float32, exact (erf) GELU in GEGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.models.kernels import attend
from diffusion_grpo.models.layers import Identity, conv, linear
from diffusion_grpo.models.norms import group_norm, layer_norm


class Attention(nnx.Module):
    """Multi-head attention softmax(q kᵀ / √d) v over tokens; softmax in float32 for any dtype."""

    def __init__(
        self,
        query_dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        bias: bool = False,
        upcast: bool = False,
        **kw: Any,
    ):
        """Build it.

        Args:
            query_dim: width of the tokens.
            heads: their number.
            head_dim: width of one.
            context_dim: width of the keys' and values' source (default: the tokens themselves).
            bias: of the three projections.
            upcast: take the products too in float32 (`upcast_attention` of Stable Diffusion 2.1).
            **kw: `dtype`, `param_dtype`, `rngs`.
        """
        inner = heads * head_dim
        context = query_dim if context_dim is None else context_dim
        self.to_q = linear(query_dim, inner, use_bias=bias, **kw)
        self.to_k = linear(context, inner, use_bias=bias, **kw)
        self.to_v = linear(context, inner, use_bias=bias, **kw)
        self.to_out = nnx.List([linear(inner, query_dim, **kw)])
        self.heads = heads
        self.upcast = upcast

    def __call__(
        self, x: Float[Array, "B n d"], context: Float[Array, "P m e"] | None = None
    ) -> Float[Array, "B n d"]:
        """Attend from `x` to `context` (or to itself).

        A context for B/P consecutive rows of `x` has its keys and values computed once, and all
        queries of these rows in one product with them: the rows are attended from as one.
        """
        context = x if context is None else context
        b, n, _ = x.shape
        rows = context.shape[0]
        q = self.to_q(x).reshape(rows, b // rows * n, self.heads, -1)
        k, v = (
            projection(context).reshape(rows, context.shape[1], self.heads, -1)
            for projection in (self.to_k, self.to_v)
        )
        dtype = q.dtype
        if self.upcast:
            q, k, v = (part.astype(jnp.float32) for part in (q, k, v))
        out = attend(q, k, v)
        return self.to_out[0](out.astype(dtype).reshape(b, n, -1))


# name → (activation, whether it gates a second half: [a, g] = proj(x), a · activation(g))
FEED_FORWARDS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "geglu": (lambda x: jax.nn.gelu(x, approximate=False), True),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), False),
    "gelu-approximate": (lambda x: jax.nn.gelu(x, approximate=True), False),
    "geglu-approximate": (lambda x: x * jax.nn.sigmoid(1.702 * x), False),
    "swiglu": (jax.nn.silu, True),
    "linear-silu": (jax.nn.silu, False),
}


class FeedForwardInput(nnx.Module):
    """The first half of a feed-forward: a projection and its activation, gated or not.

    Source: Shazeer 2020 for the gated kinds; Diffusers' names, under which `geglu-approximate` is
    x·sigmoid(1.702 x) without a gate.
    """

    def __init__(self, dim: int, inner: int, kind: str, **kw: Any):
        """Build it from `dim` to `inner`."""
        if kind not in FEED_FORWARDS:
            raise UsageError(
                f"feed-forward {kind!r} is not supported{suggest(kind, FEED_FORWARDS)}; expected "
                f"one of {', '.join(FEED_FORWARDS)}"
            )
        self.act, self.gated = FEED_FORWARDS[kind]
        self.proj = linear(dim, 2 * inner if self.gated else inner, **kw)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n i"]:
        """Map [B, n, d] to [B, n, inner]."""
        x = self.proj(x)
        if not self.gated:
            return self.act(x)
        value, gate = jnp.split(x, 2, axis=-1)
        return value * self.act(gate)


class FeedForward(nnx.Module):
    """The transformer's MLP: to four times the width, then a linear layer back."""

    def __init__(self, dim: int, kind: str = "geglu", **kw: Any):
        """Build it for width `dim`; `kind` is one of `FEED_FORWARDS`."""
        self.net = nnx.List(
            [
                FeedForwardInput(dim, 4 * dim, kind, **kw),
                Identity(),
                linear(4 * dim, dim, **kw),
            ]
        )

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Map [B, n, d] to [B, n, d]."""
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each pre-normalized and residual."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int,
        only_cross_attention: bool = False,
        upcast: bool = False,
        feed_forward: str = "geglu",
        **kw: Any,
    ):
        """Build it.

        Args:
            dim: width of the tokens.
            heads: number of attention heads.
            head_dim: width of one.
            context_dim: width of the text embeddings.
            only_cross_attention: the first attention reads the text too.
            upcast: see `Attention`.
            feed_forward: one of `FEED_FORWARDS`.
            **kw: `dtype`, `param_dtype`, `rngs`.
        """
        attention = {"heads": heads, "head_dim": head_dim, "upcast": upcast, **kw}
        self.norm1 = layer_norm(dim, **kw)
        self.attn1 = Attention(
            dim, context_dim=context_dim if only_cross_attention else None, **attention
        )
        self.norm2 = layer_norm(dim, **kw)
        self.attn2 = Attention(dim, context_dim=context_dim, **attention)
        self.norm3 = layer_norm(dim, **kw)
        self.ff = FeedForward(dim, feed_forward, **kw)
        self.only_cross_attention = only_cross_attention

    def __call__(
        self, x: Float[Array, "B n d"], context: Float[Array, "P m e"]
    ) -> Float[Array, "B n d"]:
        """Map tokens [B, n, d], given the text embeddings [P, m, e], to [B, n, d]."""
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Spatial transformer over the pixels as tokens.

    GroupNorm, projection in, blocks, projection out, residual.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_dim: int,
        groups: int,
        linear_projection: bool = False,
        only_cross_attention: bool = False,
        upcast: bool = False,
        **kw: Any,
    ):
        """Build it; `linear_projection` picks linear layers over 1×1 convolutions to project."""
        if channels % heads:
            raise UsageError(
                f"attention_head_dim: {heads} attention heads do not divide {channels} channels"
            )
        self.norm = group_norm(groups, channels, 1e-6, **kw)
        if linear_projection:
            self.proj_in = linear(channels, channels, **kw)
            self.proj_out = linear(channels, channels, **kw)
        else:
            self.proj_in = conv(channels, channels, 1, **kw)
            self.proj_out = conv(channels, channels, 1, **kw)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels,
                    heads=heads,
                    head_dim=channels // heads,
                    context_dim=context_dim,
                    only_cross_attention=only_cross_attention,
                    upcast=upcast,
                    **kw,
                )
                for _ in range(depth)
            ]
        )

    def __call__(
        self, x: Float[Array, "B h w c"], context: Float[Array, "P m e"]
    ) -> Float[Array, "B h w c"]:
        """Map [B, h, w, c], given the text embeddings [P, m, e], to [B, h, w, c]."""
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return self.proj_out(tokens.reshape(b, h, w, c)) + x


class DualTransformer2DModel(nnx.Module):
    """Two spatial transformers over two conditions (text and image tokens), averaged.

    The tokens of both come concatenated: the first `CONDITION_LENGTHS[0]` are the text's and go to
    `transformers[1]`, the rest to `transformers[0]`.
    Source: Xu et al. 2022 (Versatile Diffusion), with Diffusers' fixed lengths and mixing ratio.
    """

    CONDITION_LENGTHS = (77, 257)

    def __init__(
        self, channels: int, *, heads: int, context_dim: int, groups: int, **kw: Any
    ) -> None:
        """Build two transformers of one block each."""
        self.transformers = nnx.List(
            [
                Transformer2DModel(
                    channels, heads=heads, depth=1, context_dim=context_dim, groups=groups, **kw
                )
                for _ in range(2)
            ]
        )

    def __call__(
        self, x: Float[Array, "B h w c"], context: Float[Array, "P m e"]
    ) -> Float[Array, "B h w c"]:
        """Map [B, h, w, c], given text and image tokens [P, 334, e], to [B, h, w, c]."""
        if context.shape[1] != sum(self.CONDITION_LENGTHS):
            raise UsageError(
                f"encoder_hidden_states has {context.shape[1]} tokens; dual_cross_attention "
                f"expects {' + '.join(map(str, self.CONDITION_LENGTHS))}, of text and image"
            )
        text, image = jnp.split(context, [self.CONDITION_LENGTHS[0]], axis=1)
        return (self.transformers[1](x, text) + self.transformers[0](x, image)) / 2
