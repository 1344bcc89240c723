"""What the UNet adds to every residual block: embeddings of the timestep and of side information.

Attribute names are those of Diffusers.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from diffusion_grpo.models.layers import activation


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


class TimestepEmbedding(nnx.Module):
    """Two-layer MLP over a sinusoid or a vector: post_act(linear_2(act(linear_1(x))))."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        act_fn: str = "silu",
        post_act_fn: str | None = None,
        **kw: Any,
    ):
        """Build it from the width of the input and of the result; no `post_act_fn`, no post_act."""
        self.linear_1 = nnx.Linear(in_dim, dim, **kw)
        self.linear_2 = nnx.Linear(dim, dim, **kw)
        self.act = activation(act_fn, "act_fn")
        self.post_act = post_act_fn and activation(post_act_fn, "timestep_post_act")

    def __call__(self, x: Float[Array, "B i"]) -> Float[Array, "B d"]:
        """Map [B, i] to [B, d]."""
        x = self.linear_2(self.act(self.linear_1(x)))
        return self.post_act(x) if callable(self.post_act) else x
