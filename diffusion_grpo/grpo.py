"""Group relative policy optimization as pure functions: ratios, clipping, KL.

Nothing here knows of diffusion. A policy is seen through numbers only: log-probs under the new, the
old and the reference policy, and advantages (`advantages.py`). The generic trainer and the
diffusion update both call these functions.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffusion_grpo.advantages import group_advantages, uninformative_groups

__all__ = [
    "adapted_beta",
    "clipped_surrogate",
    "group_advantages",
    "guarded_log_ratio",
    "kl_estimate",
    "masked_surrogate",
    "scaled_clip",
    "uninformative_groups",
]

Scalar = float | Float[Array, ""]
Estimator = Literal["k1", "k2", "k3"]

# The largest exponent of a ratio: e^80 is near the end of float32, and beyond every clip range.
MAX_LOG_RATIO = 80.0


def clipped_surrogate(
    log_ratio: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Return PPO's loss of each sample (Schulman et al. 2017, eq. 7), and where it is clipped.

    max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)) with ρ = exp(log_ratio): no gradient where ρ has
    already moved past the range in the direction that A asks for. With `dual_clip` c the loss of a
    sample with A < 0 is at most −A c, so that one whose ρ grew beyond c pulls no more (dual clip,
    Ye et al. 2020, eq. 5). ρ is at most e^80, so that losses and gradients stay finite.

    Args:
        log_ratio: log π_θ − log π_old.
        advantages: A, same shape.
        clip_low: ε_low.
        clip_high: ε_high.
        dual_clip: c > 1; None leaves it out.

    Returns:
        Losses, and whether a branch without gradient is the one taken; same shape.
    """
    ratio = _bounded_ratio(log_ratio)
    free = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss, clipped = jnp.maximum(free, bounded), bounded > free
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        above = (advantages < 0) & (loss > ceiling)
        loss, clipped = jnp.where(above, ceiling, loss), clipped | above
    return loss, clipped


def masked_surrogate(
    log_ratio: Float[Array, "..."],
    advantages: Float[Array, "..."],
    divergence: Float[Array, "..."],
    *,
    limit: Scalar,
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Return −A ρ without clipping, dropped where the policy is far away and moves outward (DPPO).

    A sample is dropped (loss and gradient 0) where its divergence from the old policy is above the
    limit and A asks to go on in the direction it went: A > 0 and ρ > 1, or A < 0 and ρ < 1. So what
    counts is how far the distribution moved, not how far the ratio of one draw did. Source:
    divergence PPO's mask, with the KL of the two Gaussians as the divergence. ρ is at most e^80.

    Args:
        log_ratio: log π_θ − log π_old.
        advantages: A, same shape.
        divergence: KL between old and new policy, same shape, ≥ 0.
        limit: in the divergence's units.

    Returns:
        Losses, and whether a sample is dropped; same shape.
    """
    dropped = (divergence > limit) & (advantages * log_ratio > 0)
    return jnp.where(dropped, 0.0, -advantages * _bounded_ratio(log_ratio)), dropped


def _bounded_ratio(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    # An infinite ratio times a gradient of 0, of a sample that is clipped or dropped, is NaN.
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def guarded_log_ratio(
    log_ratio: Float[Array, "..."], divergence: Float[Array, "..."], std: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return GRPO-Guard's normalized log-ratio of a Gaussian step, (log ρ + ‖Δμ‖²/(2σ²)) σ.

    Under the old policy log ρ has mean −‖Δμ‖²/(2σ²), so that good samples clip later than bad ones;
    adding it back centers the ratio. The factor σ makes its spread that of Δμ itself, the same for
    a given change of the mean at every step.

    Args:
        log_ratio: log π_θ − log π_old of one step, reduced over the latent.
        divergence: ‖Δμ‖²/(2σ²), Δμ = μ_θ − μ_old, reduced alike.
        std: σ of the step, broadcast against the others.

    Returns:
        The exponent of the ratio, same shape.
    """
    return (log_ratio + divergence) * std


def scaled_clip(clip_low: float, clip_high: float, scale: float) -> tuple[float, float]:
    """Scale a clip range in log ρ: ρ in [(1 − ε_low)^s, (1 + ε_high)^s].

    For small ranges this is s ε; for large ones the lower bound stays above 0.

    Args:
        clip_low: ε_low in (0, 1).
        clip_high: ε_high > 0.
        scale: s > 0.

    Returns:
        ε_low and ε_high of the scaled range: 1 − (1 − ε_low)^s and (1 + ε_high)^s − 1.
    """
    high = min(scale * math.log1p(clip_high), MAX_LOG_RATIO)
    return -math.expm1(scale * math.log1p(-clip_low)), math.expm1(high)


def kl_estimate(
    log_ratio: Float[Array, "..."], kind: Estimator, *, elements: int = 1
) -> Float[Array, "..."]:
    """Estimate KL(π_θ ‖ π_ref) of each sample drawn from π_θ.

    With δ = log π_θ − log π_ref: k1 = δ (unbiased, any sign), k2 = δ²/2 (biased, ≥ 0),
    k3 = e^(−δ) − 1 + δ (unbiased, ≥ 0). Source: Schulman 2020, "Approximating KL divergence".

    As a loss each has the gradient of its formula: ∇δ for k1, whose expectation is 0; δ ∇δ for k2,
    whose expectation is the gradient of KL(π_θ ‖ π_ref); (1 − e^(−δ)) ∇δ for k3, whose expectation
    is the gradient of KL(π_ref ‖ π_θ).

    Log-probs that are means over D elements, not sums, have δ/D for δ. Of it k1 estimates KL/D, and
    k2 and k3, which are quadratic, are multiplied by D, so that they do so too: k2 as it would, k3
    up to the third order of δ/D.

    Args:
        log_ratio: δ, or δ/D.
        kind: the estimator.
        elements: D; 1 where the log-probs are those of densities.

    Returns:
        Estimates in nats, or in nats an element, same shape.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * elements * jnp.square(log_ratio)
    return elements * (jnp.expm1(-log_ratio) + log_ratio)


def adapted_beta(beta: float, kl: float, target: float, *, gain: float = 0.1) -> float:
    """Return the next β of a controller that holds the KL at a target.

    β (1 + K e) with e = clip((KL − target)/target, −0.2, 0.2). Source: Ziegler et al. 2019,
    section 2.2, with their K = 0.1.

    Args:
        beta: β > 0 now.
        kl: measured with it, in the units of the target.
        target: > 0.
        gain: K.

    Returns:
        β for the next iteration, > 0; the same if the KL is not finite.
    """
    if not math.isfinite(kl):
        return beta
    error = min(0.2, max(-0.2, (kl - target) / target))
    return beta * (1 + gain * error)


def __getattr__(name: str) -> Any:
    """Offer the trainer here too; it is built on this module, so it cannot be imported above."""
    if name in ("GRPOConfig", "GRPOTrainer"):
        from diffusion_grpo import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
