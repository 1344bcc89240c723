"""GroupNorm and LayerNorm: statistics in float32, two-pass variance, as PyTorch has them.

A GroupNorm can also be told its statistics. That is what lets an autoencoder decode an image tile
by tile without seams: all tiles are normalized by the statistics of the whole.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What GroupNorms do with their statistics within `using`, in the order they are called.

    Attributes:
        weights: `[h, w]`, of the pixels of a tile in the statistics that are recorded.
        given: mean and variance `[B, groups]` for the first of them to normalize by, instead of
            their own.
        recorded: mean and variance `[B, groups]` of what came in, one entry a call.
    """

    weights: Float[Array, "h w"]
    given: tuple[tuple[Any, Any], ...] = ()
    recorded: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)


_CURRENT: contextvars.ContextVar[Statistics | None] = contextvars.ContextVar(
    "group_norm_statistics", default=None
)


@contextlib.contextmanager
def using(statistics: Statistics) -> Iterator[Statistics]:
    """Have the GroupNorms traced inside record, and use if given, the statistics."""
    token = _CURRENT.set(statistics)
    try:
        yield statistics
    finally:
        _CURRENT.reset(token)


class GroupNorm(nnx.GroupNorm):
    """GroupNorm over the last axis, statistics in float32 and the result in the compute dtype.

    Means are taken over the pixels of each channel first, and over the channels of a group then:
    no axis is split on the large array, which XLA's CPU backend would run 3 times slower.
    """

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:  # type: ignore[override]
        """Normalize groups of channels, (x − mean) / √(variance + ε) · scale + bias."""
        statistics = _CURRENT.get()
        if statistics is not None:
            return self._with(statistics, x)
        values = x.astype(jnp.float32)
        centered = values - self._of_groups(values)
        variance = self._of_groups(centered * centered)
        assert self.scale is not None and self.bias is not None
        lead = (1,) * (x.ndim - 1)
        scale, bias = (
            p[...].astype(jnp.float32).reshape(*lead, -1) for p in (self.scale, self.bias)
        )
        normed = centered * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return normed.astype(self.dtype or x.dtype)

    def _of_groups(self, x: Array) -> Array:
        """Mean over the pixels and over each group's channels, for every channel."""
        channels = x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
        groups = channels.reshape(*channels.shape[:-1], self.num_groups, -1).mean(axis=-1)
        return jnp.repeat(groups, x.shape[-1] // self.num_groups, axis=-1)

    def _with(self, statistics: Statistics, x: Float[Array, "B h w c"]) -> Array:
        b, h, w, c = x.shape
        groups = x.astype(jnp.float32).reshape(b, h * w, self.num_groups, -1)
        rows, columns = statistics.weights.shape
        weights = statistics.weights.repeat(h // rows, axis=0).repeat(w // columns, axis=1)
        weights = (weights / weights.sum()).reshape(1, h * w, 1, 1)
        mean = (weights * groups).sum(axis=1).mean(axis=-1)
        centered = groups - mean[:, None, :, None]
        variance = (weights * centered**2).sum(axis=1).mean(axis=-1)
        statistics.recorded.append((mean, variance))
        if len(statistics.recorded) <= len(statistics.given):
            mean, variance = statistics.given[len(statistics.recorded) - 1]
            centered = groups - mean[:, None, :, None]
        normed = centered * jax.lax.rsqrt(variance + self.epsilon)[:, None, :, None]
        assert self.scale is not None and self.bias is not None
        scale, bias = (
            p[...].astype(jnp.float32)[None, None, None] for p in (self.scale, self.bias)
        )
        return (normed.reshape(x.shape) * scale + bias).astype(self.dtype or x.dtype)


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, statistics in float32 and the result in the compute dtype."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Normalize over the last axis; as in `GroupNorm`."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


def group_norm(groups: int, channels: int, eps: float, **kw: Any) -> GroupNorm:
    """Build a GroupNorm over `channels`."""
    if channels % groups:
        raise UsageError(
            f"norm_num_groups={groups} does not divide {channels} channels; choose a divisor of "
            "every block's width"
        )
    return GroupNorm(channels, num_groups=groups, epsilon=eps, use_fast_variance=False, **kw)


def layer_norm(channels: int, eps: float = 1e-5, **kw: Any) -> LayerNorm:
    """Build a LayerNorm over the last axis."""
    return LayerNorm(channels, epsilon=eps, use_fast_variance=False, **kw)
