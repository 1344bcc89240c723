"""Log-density and KL divergence of the Gaussian denoising steps, float32, safe where σ = 0."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Reduction = Literal["mean", "sum"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _reduce(values: Float[Array, " B *latent"], reduction: Reduction) -> Float[Array, " B"]:
    axes = tuple(range(1, values.ndim))
    return values.mean(axes) if reduction == "mean" else values.sum(axes)


def _safe_std(
    std: Float[Array, ""] | Float[Array, " B"] | float, ndim: int
) -> tuple[Array, Array, Array]:
    """Return (has a density, σ or 1 where it has none, the latter shaped for a `[B, ...]` array).

    Dividing by 1 instead of 0 keeps the unused branch of the `where` finite, and its gradient too.
    """
    std = jnp.asarray(std, jnp.float32)
    positive = std > 0
    safe = jnp.where(positive, std, jnp.ones_like(std))
    return positive, safe, safe if std.ndim == 0 else safe.reshape((-1,) + (1,) * (ndim - 1))


def gaussian_log_prob(
    x: Float[Array, " B *latent"],
    mean: Float[Array, " B *latent"],
    std: Float[Array, ""] | Float[Array, " B"] | float,
    *,
    reduction: Reduction,
) -> Float[Array, " B"]:
    """Return log N(x; μ, σ² I), reduced over the latent.

    −(x−μ)²/(2σ²) − log σ − ½ log 2π, averaged over the latent's elements (`mean`, the scale of
    DDPO, Black et al. 2023) or summed (`sum`, the density itself). Where σ = 0 there is no density:
    the result is 0, with gradient 0.

    Args:
        x: the sample, exactly as it is stored (round it before, not after).
        mean: μ.
        std: σ, a scalar or one an image.
        reduction: over the latent's elements.

    Returns:
        float32 [B], in nats; with `mean` in nats an element.
    """
    positive, safe, divisor = _safe_std(std, x.ndim)
    z = (x.astype(jnp.float32) - mean.astype(jnp.float32)) / divisor
    count = 1 if reduction == "mean" else math.prod(x.shape[1:])
    log_prob = -0.5 * _reduce(z * z, reduction) - count * (jnp.log(safe) + _HALF_LOG_2PI)
    return jnp.where(positive, log_prob, 0.0)


def gaussian_kl(
    mean_p: Float[Array, " B *latent"],
    mean_q: Float[Array, " B *latent"],
    std: Float[Array, ""] | Float[Array, " B"] | float,
    *,
    reduction: Reduction,
    std_q: Float[Array, ""] | Float[Array, " B"] | float | None = None,
) -> Float[Array, " B"]:
    """Return KL(N(μ_p, σ² I) ‖ N(μ_q, σ_q² I)), reduced over the latent.

    ‖μ_p − μ_q‖²/(2σ²) where both share σ, and then symmetric in p and q. With σ_q given, an element
    counts log(σ_q/σ) + (σ² + (μ_p − μ_q)²)/(2σ_q²) − ½. Where σ = 0 the result is 0, with
    gradient 0.

    Args:
        mean_p: μ_p.
        mean_q: μ_q.
        std: σ, a scalar or one an image.
        reduction: average over the latent's elements, or total (`sum`, the divergence itself).
        std_q: σ_q, shaped like `std`, 0 where it is; None where both share σ.

    Returns:
        float32 [B], in nats; with `mean` in nats an element.
    """
    positive, safe, divisor = _safe_std(std, mean_p.ndim)
    scale = jnp.zeros_like(safe)
    if std_q is not None:
        _, safe_q, divisor = _safe_std(std_q, mean_p.ndim)
        log_scale = jnp.log(safe) - jnp.log(safe_q)
        scale = 0.5 * jnp.expm1(2 * log_scale) - log_scale
    count = 1 if reduction == "mean" else math.prod(mean_p.shape[1:])
    z = (mean_p.astype(jnp.float32) - mean_q.astype(jnp.float32)) / divisor
    return jnp.where(positive, 0.5 * _reduce(z * z, reduction) + count * scale, 0.0)


def gaussian_entropy(
    std: Float[Array, " *shape"], size: int, *, reduction: Reduction
) -> Float[Array, " *shape"]:
    """Return the entropy of N(μ, σ² I) over a latent of `size` elements.

    log σ + ½ log 2πe an element; `mean` gives that, `sum` the total. Where σ = 0 the result is 0,
    with gradient 0: a deterministic step has no density, and takes no part.

    Args:
        std: σ, any shape.
        size: D, elements of a latent.
        reduction: as in `gaussian_log_prob`.

    Returns:
        float32, shaped like `std`, in nats; with `mean` in nats an element.
    """
    positive, safe, _ = _safe_std(std, 1)
    count = 1 if reduction == "mean" else size
    return jnp.where(positive, count * (jnp.log(safe) + _HALF_LOG_2PI + 0.5), 0.0)
