"""Group relative policy optimization as pure functions.

Advantages, the clipped surrogate, KL estimators. Nothing here knows of diffusion. A policy is seen
through numbers only: log-probs under the new, the old and the reference policy, and rewards laid
out group by group, `[P * G]`.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffusion_grpo.errors import UsageError

Advantage = Literal["group", "group_mean", "group_global_std", "leave_one_out"]


def _grouped(values: Float[Array, " B"], group_size: int) -> Float[Array, "P G"]:
    """Lay `[P * G]` out as `[P, G]`.

    Raises:
        UsageError: the group size is below 2 or does not divide the number of values.
    """
    if group_size < 2:
        raise UsageError(
            f"group_size is {group_size}; expected 2 or more, since a group's rewards are compared "
            "with each other"
        )
    if values.shape[0] % group_size:
        raise UsageError(
            f"{values.shape[0]} rewards do not divide into groups of {group_size}; expected a "
            "multiple, laid out group by group"
        )
    return values.reshape(-1, group_size)


def group_advantages(
    rewards: Float[Array, " B"],
    group_size: int,
    *,
    kind: Advantage = "group",
    eps: float = 1e-8,
    clip: float | None = None,
) -> Float[Array, " B"]:
    """Return how much better each sample is than the others of its group.

    With r the rewards of a group, std the population standard deviation (divisor G):

    - `group`: (r − mean) / (std + eps) (Shao et al. 2024, section 4.1)
    - `group_mean`: r − mean (Dr. GRPO, Liu et al. 2025)
    - `group_global_std`: (r − mean) / (std of the whole batch + eps) (Flow-GRPO, Liu et al. 2025)
    - `leave_one_out`: r − mean of the others = (r − mean) G/(G−1) (RLOO, Ahmadian et al. 2024)

    A group of equal rewards gets exactly 0 whatever their magnitude: the group's first reward is
    subtracted before the mean is taken, so no rounding of a large mean is left over to be divided
    by a tiny std.

    Args:
        rewards: [P·G], group by group.
        group_size: G, at least 2.
        kind: see above.
        eps: in units of the reward.
        clip: bound on the absolute value, None for none.

    Returns:
        Advantages [P·G], float32.

    Raises:
        UsageError: the group size is below 2 or does not divide the batch.
    """
    groups = _grouped(rewards.astype(jnp.float32), group_size)
    shifted = groups - groups[:, :1]
    centered = shifted - shifted.mean(axis=1, keepdims=True)
    if kind == "group":
        advantages = centered / (_std(centered, axis=1) + eps)
    elif kind == "group_mean":
        advantages = centered
    elif kind == "group_global_std":
        batch = rewards.astype(jnp.float32) - rewards[0].astype(jnp.float32)
        advantages = centered / (_std(batch - batch.mean()) + eps)
    elif kind == "leave_one_out":
        advantages = centered * (group_size / (group_size - 1))
    else:
        raise UsageError(
            f"advantage {kind!r} is unknown; expected 'group', 'group_mean', 'group_global_std' or "
            "'leave_one_out'"
        )
    advantages = advantages.reshape(-1)
    return advantages if clip is None else jnp.clip(advantages, -clip, clip)


def _std(centered: Array, axis: int | None = None) -> Array:
    return jnp.sqrt(jnp.square(centered).mean(axis=axis, keepdims=axis is not None))


def uninformative_groups(rewards: Float[Array, " B"], group_size: int) -> Bool[Array, " P"]:
    """Say which groups have all rewards equal, so that they teach nothing."""
    groups = _grouped(rewards, group_size)
    return groups.max(axis=1) == groups.min(axis=1)


def clipped_surrogate(
    log_ratio: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Return PPO's loss of each sample (Schulman et al. 2017, eq. 7), and where it is clipped.

    max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)) with ρ = exp(log_ratio): no gradient where ρ has
    already moved past the range in the direction that A asks for.

    Args:
        log_ratio: log π_θ − log π_old.
        advantages: A, same shape.
        clip_low: ε_low.
        clip_high: ε_high.

    Returns:
        Losses, and whether the clipped branch (which has no gradient) is the one taken; same shape.
    """
    ratio = jnp.exp(log_ratio)
    free = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.maximum(free, bounded), bounded > free


def kl_estimate(
    log_ratio: Float[Array, "..."], kind: Literal["k1", "k2", "k3"]
) -> Float[Array, "..."]:
    """Estimate KL(π_θ ‖ π_ref) of each sample drawn from π_θ.

    With δ = log π_θ − log π_ref: k1 = δ (unbiased, any sign), k2 = δ²/2 (biased, ≥ 0),
    k3 = e^(−δ) − 1 + δ (unbiased, ≥ 0). Source: Schulman 2020, "Approximating KL divergence".

    Args:
        log_ratio: δ.
        kind: the estimator.

    Returns:
        Estimates in nats, same shape.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    return jnp.expm1(-log_ratio) + log_ratio


def __getattr__(name: str) -> Any:
    """Offer the trainer here too; it is built on this module, so it cannot be imported above."""
    if name in ("GRPOConfig", "GRPOTrainer"):
        from diffusion_grpo import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
