"""The pre-norm transformer that CLIP's two towers share, named as in Transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.models.layers import linear


def quick_gelu(x: Array) -> Array:
    """Return x·sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu_exact(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": _gelu_exact,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def checked_activation(name: str) -> str:
    """Return `name` if it is an activation that we have, else raise `UsageError`."""
    if name not in ACTIVATIONS:
        raise UsageError(
            f"CLIP config: hidden_act = {name!r} is not supported; expected one of "
            f"{', '.join(ACTIVATIONS)}{suggest(str(name), list(ACTIVATIONS))}"
        )
    return name


def checked_int(config: Any, field: str) -> int:
    """Return the config's `field` if it is one integer, else raise `UsageError`."""
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"CLIP config: {field} = {value!r} is not supported; expected one integer")
    return value


class LayerNorm(nnx.LayerNorm):
    """Layer norm in float32 whatever the compute dtype; returns the dtype of its input."""

    def __init__(self, features: int, *, epsilon: float, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Build it over an axis of `features`."""
        super().__init__(
            features,
            epsilon=epsilon,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            use_fast_variance=False,  # E[x²]−E[x]² loses digits where the mean is large
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*batch d"], **kwargs: Any) -> Float[Array, "*batch d"]:
        """Normalize the last axis."""
        return super().__call__(x.astype(jnp.float32), **kwargs).astype(x.dtype)


class CLIPAttention(nnx.Module):
    """Multi-head self-attention: softmax(q kᵀ / √head_dim) v."""

    def __init__(
        self, config: Any, *, causal: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        """Build it from the config of a tower."""
        width = checked_int(config, "hidden_size")
        self.num_heads = checked_int(config, "num_attention_heads")
        self.causal = causal
        if width % self.num_heads:
            raise UsageError(
                f"CLIP config: hidden_size = {width} is not a multiple of "
                f"num_attention_heads = {self.num_heads}"
            )
        factor = config.initializer_factor
        in_std = factor * width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        out_std = factor * width**-0.5

        def projection(std: float) -> nnx.Linear:
            return linear(
                width,
                width,
                kernel_init=nnx.initializers.normal(std),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.q_proj = projection(in_std)
        self.k_proj = projection(in_std)
        self.v_proj = projection(in_std)
        self.out_proj = projection(out_std)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Attend within each sequence; with `causal`, to the tokens up to one's own."""
        batch, tokens, width = x.shape
        heads = (batch, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (
            proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Inside, JAX promotes bfloat16 to float32 implicitly, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            out = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(out.reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, config: Any, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Build it from the config of a tower."""
        self.hidden_act = checked_activation(config.hidden_act)
        width, inner = config.hidden_size, checked_int(config, "intermediate_size")
        factor = config.initializer_factor
        self.fc1 = linear(
            width,
            inner,
            kernel_init=nnx.initializers.normal(factor * (2 * width) ** -0.5),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        out_std = factor * width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        self.fc2 = linear(
            inner,
            width,
            kernel_init=nnx.initializers.normal(out_std),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Return fc2(act(fc1(x)))."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, config: Any, *, causal: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        """Build it from the config of a tower."""
        width, epsilon = config.hidden_size, config.layer_norm_eps
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.self_attn = CLIPAttention(config, causal=causal, **kinds)
        self.layer_norm1 = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)
        self.mlp = CLIPMLP(config, **kinds)
        self.layer_norm2 = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """Return x + attention, then + MLP, each of the normalized input."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stack of layers; with `gradient_checkpointing` each one is recomputed in the backward."""

    def __init__(
        self,
        config: Any,
        *,
        causal: bool,
        dtype: Any,
        param_dtype: Any,
        gradient_checkpointing: bool,
        rngs: nnx.Rngs,
    ) -> None:
        """Build `num_hidden_layers` layers."""
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nnx.List(
            [
                CLIPEncoderLayer(
                    config, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs
                )
                for _ in range(checked_int(config, "num_hidden_layers"))
            ]
        )

    def __call__(self, x: Float[Array, "B n d"]) -> tuple[Array, ...]:
        """Return the input and the output of every layer, `num_layers + 1` arrays `[B, n, d]`."""
        hidden_states = [x]
        for layer in self.layers:
            call = type(layer).__call__
            if self.gradient_checkpointing:
                call = jax.checkpoint(call)
            hidden_states.append(call(layer, hidden_states[-1]))
        return tuple(hidden_states)


def embed(
    rows: int, width: int, std: float, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
) -> nnx.Embed:
    """Return an embedding table `[rows, width]`, normal with standard deviation `std`."""
    return nnx.Embed(
        rows,
        width,
        embedding_init=nnx.initializers.normal(std),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
