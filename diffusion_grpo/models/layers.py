"""Building blocks shared by the UNet and the VAE, in NHWC layout.

Attribute names are those of Diffusers, so that a checkpoint's parameter names are module paths.
Nothing here knows of diffusion steps, rewards or GRPO. PyTorch's Diffusers is the reference for the
numerics: GroupNorm and LayerNorm with two-pass variance in float32, exact (erf) GELU in GEGLU,
nearest upsampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from diffusion_grpo.errors import UsageError

DType = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


def activation(name: str, field: str) -> Callable[[Array], Array]:
    """Return the activation function a checkpoint's config names.

    Args:
        name: one of `ACTIVATIONS`.
        field: the config field it stands in, for the error message.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise UsageError(
            f"{field}={name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def checkpointed(module: nnx.Module, enabled: bool, *args: Any) -> Any:
    """Call `module(*args)`, recomputing its activations in the backward pass when `enabled`."""
    forward = type(module).__call__
    return (jax.checkpoint(forward) if enabled else forward)(module, *args)


def sinusoidal_embedding(
    timesteps: Num[Array, " B"],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
) -> Float[Array, "B d"]:
    """Embed timesteps as [cos(t ω_k), sin(t ω_k)] with ω_k = 10000^(−k / (d/2 − freq_shift)).

    Source: Vaswani et al. 2017, section 3.5, in the variant of Ho et al. 2020
    (`flip_sin_to_cos=False` puts the sines first). Always float32.
    """
    half = dim // 2
    frequencies = jnp.exp(
        -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    )
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (
        (jnp.cos(angles), jnp.sin(angles))
        if flip_sin_to_cos
        else (jnp.sin(angles), jnp.cos(angles))
    )
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    dtype: DType,
    param_dtype: DType,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a square convolution with PyTorch's symmetric padding (`kernel // 2` by default)."""
    pad = kernel // 2 if padding is None else padding
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class GroupNorm(nnx.GroupNorm):
    """Flax's GroupNorm, statistics in float32 and the result in the compute dtype."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Normalize groups of channels; inside, Flax promotes bfloat16 to float32 implicitly."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, statistics in float32 and the result in the compute dtype."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Normalize over the last axis; as in `GroupNorm`."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


def group_norm(groups: int, channels: int, eps: float, **kw: Any) -> GroupNorm:
    """Build a GroupNorm with the two-pass variance PyTorch has."""
    if channels % groups:
        raise UsageError(
            f"norm_num_groups={groups} does not divide {channels} channels; choose a divisor of "
            "every block's width"
        )
    return GroupNorm(channels, num_groups=groups, epsilon=eps, use_fast_variance=False, **kw)


def layer_norm(channels: int, eps: float = 1e-5, **kw: Any) -> LayerNorm:
    """Build a LayerNorm over the last axis with the two-pass variance PyTorch has."""
    return LayerNorm(channels, epsilon=eps, use_fast_variance=False, **kw)


class Identity(nnx.Module):
    """Stand where the checkpoint's numbering has a module without parameters (dropout)."""

    def __call__(self, x: Array) -> Array:
        """Return the input."""
        return x


class TimestepEmbedding(nnx.Module):
    """Two-layer MLP over the sinusoidal embedding: linear_2(act(linear_1(x)))."""

    def __init__(self, in_dim: int, dim: int, act_fn: str = "silu", **kw: Any):
        """Build it from the width of the sinusoid and of the result."""
        self.linear_1 = nnx.Linear(in_dim, dim, **kw)
        self.linear_2 = nnx.Linear(dim, dim, **kw)
        self.act = activation(act_fn, "act_fn")

    def __call__(self, x: Float[Array, "B i"]) -> Float[Array, "B d"]:
        """Map [B, i] to [B, d]."""
        return self.linear_2(self.act(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """Residual block: conv2(act(norm2(conv1(act(norm1(x))) + time))) + shortcut(x).

    With `time_scale_shift="scale_shift"` the time embedding gives (scale, shift) applied after
    norm2 instead.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        groups: int,
        eps: float,
        act_fn: str = "silu",
        time_scale_shift: str = "default",
        **kw: Any,
    ):
        """Build the block; `temb_channels=None` leaves the time embedding out (VAE)."""
        self.norm1 = group_norm(groups, in_channels, eps, **kw)
        self.conv1 = conv(in_channels, out_channels, 3, **kw)
        self.scale_shift = time_scale_shift == "scale_shift"
        if temb_channels is not None:
            width = 2 * out_channels if self.scale_shift else out_channels
            self.time_emb_proj = nnx.Linear(temb_channels, width, **kw)
        self.norm2 = group_norm(groups, out_channels, eps, **kw)
        self.conv2 = conv(out_channels, out_channels, 3, **kw)
        if in_channels != out_channels:
            self.conv_shortcut = conv(in_channels, out_channels, 1, **kw)
        self.has_time = temb_channels is not None
        self.has_shortcut = in_channels != out_channels
        self.act = activation(act_fn, "act_fn")

    def __call__(
        self, x: Float[Array, "B h w i"], temb: Float[Array, "B e"] | None = None
    ) -> Float[Array, "B h w o"]:
        """Map [B, h, w, in_channels] to [B, h, w, out_channels]."""
        h = self.conv1(self.act(self.norm1(x)))
        if self.has_time:
            assert temb is not None
            time = self.time_emb_proj(self.act(temb))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + time)
        else:
            h = self.norm2(h)
        h = self.conv2(self.act(h))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + h


class Downsample2D(nnx.Module):
    """Strided 3×3 convolution; `padding=0` pads right and bottom by one (VAE's encoder)."""

    def __init__(self, channels: int, *, padding: int = 1, **kw: Any):
        """Build it for `channels` in and out."""
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, **kw)
        self.asymmetric = padding == 0

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        """Halve the spatial size."""
        if self.asymmetric:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbor upsampling, then a 3×3 convolution."""

    def __init__(self, channels: int, **kw: Any):
        """Build it for `channels` in and out."""
        self.conv = conv(channels, channels, 3, **kw)

    def __call__(
        self, x: Float[Array, "B h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B h2 w2 c"]:
        """Double the spatial size, or bring it to `size` (odd sizes met on the way down)."""
        b, h, w, c = x.shape
        if size is None or size == (2 * h, 2 * w):
            x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(
                b, 2 * h, 2 * w, c
            )
        else:
            rows = jnp.asarray([math.floor(i * h / size[0]) for i in range(size[0])])
            cols = jnp.asarray([math.floor(j * w / size[1]) for j in range(size[1])])
            x = jnp.take(jnp.take(x, rows, axis=1), cols, axis=2)
        return self.conv(x)


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
        **kw: Any,
    ):
        """Build it; `context_dim` is the width of the keys' and values' source (default: own)."""
        inner = heads * head_dim
        context = query_dim if context_dim is None else context_dim
        self.to_q = nnx.Linear(query_dim, inner, use_bias=bias, **kw)
        self.to_k = nnx.Linear(context, inner, use_bias=bias, **kw)
        self.to_v = nnx.Linear(context, inner, use_bias=bias, **kw)
        self.to_out = nnx.List([nnx.Linear(inner, query_dim, **kw)])
        self.heads = heads

    def __call__(
        self, x: Float[Array, "B n d"], context: Float[Array, "B m e"] | None = None
    ) -> Float[Array, "B n d"]:
        """Attend from `x` to `context` (or to itself)."""
        context = x if context is None else context
        b, n, _ = x.shape
        m = context.shape[1]
        q = self.to_q(x).reshape(b, n, self.heads, -1)
        k = self.to_k(context).reshape(b, m, self.heads, -1)
        v = self.to_v(context).reshape(b, m, self.heads, -1)
        # Inside, JAX promotes bfloat16 to float32 implicitly, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            out = jax.nn.dot_product_attention(q, k, v)
        return self.to_out[0](out.reshape(b, n, -1))


class GEGLU(nnx.Module):
    """Gated GELU: with [a, g] = proj(x), a · gelu(g) (Shazeer 2020), exact erf form."""

    def __init__(self, dim: int, inner: int, **kw: Any):
        """Build it from `dim` to `inner`."""
        self.proj = nnx.Linear(dim, 2 * inner, **kw)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n i"]:
        """Map [B, n, d] to [B, n, inner]."""
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """The transformer's MLP: GEGLU to four times the width, then a linear layer back."""

    def __init__(self, dim: int, **kw: Any):
        """Build it for width `dim`."""
        self.net = nnx.List([GEGLU(dim, 4 * dim, **kw), Identity(), nnx.Linear(4 * dim, dim, **kw)])

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Map [B, n, d] to [B, n, d]."""
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each pre-normalized and residual."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, context_dim: int, **kw: Any):
        """Build it for width `dim` and text embeddings of width `context_dim`."""
        self.norm1 = layer_norm(dim, **kw)
        self.attn1 = Attention(dim, heads=heads, head_dim=head_dim, **kw)
        self.norm2 = layer_norm(dim, **kw)
        self.attn2 = Attention(dim, heads=heads, head_dim=head_dim, context_dim=context_dim, **kw)
        self.norm3 = layer_norm(dim, **kw)
        self.ff = FeedForward(dim, **kw)

    def __call__(
        self, x: Float[Array, "B n d"], context: Float[Array, "B m e"]
    ) -> Float[Array, "B n d"]:
        """Map tokens [B, n, d], given the text embeddings [B, m, e], to [B, n, d]."""
        x = x + self.attn1(self.norm1(x))
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
        linear_projection: bool,
        **kw: Any,
    ):
        """Build it; `linear_projection` picks linear layers over 1×1 convolutions to project."""
        if channels % heads:
            raise UsageError(f"{heads} attention heads do not divide {channels} channels")
        self.norm = group_norm(groups, channels, 1e-6, **kw)
        if linear_projection:
            self.proj_in = nnx.Linear(channels, channels, **kw)
            self.proj_out = nnx.Linear(channels, channels, **kw)
        else:
            self.proj_in = conv(channels, channels, 1, **kw)
            self.proj_out = conv(channels, channels, 1, **kw)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels, heads=heads, head_dim=channels // heads, context_dim=context_dim, **kw
                )
                for _ in range(depth)
            ]
        )

    def __call__(
        self, x: Float[Array, "B h w c"], context: Float[Array, "B m e"]
    ) -> Float[Array, "B h w c"]:
        """Map [B, h, w, c], given the text embeddings [B, m, e], to [B, h, w, c]."""
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return self.proj_out(tokens.reshape(b, h, w, c)) + x
