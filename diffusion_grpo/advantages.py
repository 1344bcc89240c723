"""How much better an image is than the others of its prompt: the advantages of GRPO and its kin.

Rewards are laid out group by group, `[P * G]`. A group of equal rewards gets exactly 0, whatever
their magnitude, so that no rounding of a large mean is left over to be divided by a tiny std.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
) -> Float[Array, " B"]:
    """Return how much better each sample is than the others of its group.

    With r the rewards of a group, std the population standard deviation (divisor G):

    - `group`: (r − mean) / (std + eps) (Shao et al. 2024, section 4.1)
    - `group_mean`: r − mean (Dr. GRPO, Liu et al. 2025)
    - `group_global_std`: (r − mean) / (std of the whole batch + eps) (Flow-GRPO, Liu et al. 2025)
    - `leave_one_out`: r − mean of the others = (r − mean) G/(G−1) (RLOO, Ahmadian et al. 2024)

    A group of equal rewards gets exactly 0 whatever their magnitude: the group's first reward is
    subtracted before the mean is taken.

    Args:
        rewards: [P·G], group by group.
        group_size: G, at least 2.
        kind: see above.
        eps: in units of the reward.

    Returns:
        Advantages [P·G], float32.

    Raises:
        UsageError: the group size is below 2 or does not divide the batch, or there is no such
            kind.
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
    return advantages.reshape(-1)


def _std(centered: Array, axis: int | None = None) -> Array:
    return jnp.sqrt(jnp.square(centered).mean(axis=axis, keepdims=axis is not None))


def uninformative_groups(rewards: Float[Array, " B"], group_size: int) -> Bool[Array, " P"]:
    """Say which groups have all rewards equal, so that they teach nothing."""
    groups = _grouped(rewards, group_size)
    return groups.max(axis=1) == groups.min(axis=1)


def weighted_advantages(
    scores: Mapping[str, Float[Array, " B"]],
    weights: Mapping[str, float],
    group_size: int,
    *,
    kind: Advantage = "group",
    eps: float = 1e-8,
    clip: float = math.inf,
) -> Float[Array, " B"]:
    """Normalize each of several rewards in its group, then weight and sum: Σ_k w_k A_k (GDPO).

    Rewards of different scales then count as their weights say; of a weighted sum of rewards, the
    one with the largest spread would be most of the advantage. Source: GDPO, Liu et al. 2026
    (their further division by the batch's std is left out: it would undo the weights' scale).

    Args:
        scores: reward name to [P·G].
        weights: reward name to w_k; the same names.
        group_size: G.
        kind: as in `group_advantages`.
        eps: in units of each reward.
        clip: of each A_k before it is weighted; see `clip_advantages`.

    Returns:
        Advantages [P·G], float32.

    Raises:
        UsageError: as `group_advantages`.
        ValueError: the names differ.
    """
    if set(scores) != set(weights):
        raise ValueError(f"scores of {sorted(scores)} but weights of {sorted(weights)}")
    parts = []
    for name, score in scores.items():
        advantages = group_advantages(jnp.asarray(score), group_size, kind=kind, eps=eps)
        parts.append(weights[name] * clip_advantages(advantages, clip, kind))
    return jnp.stack(parts).sum(axis=0)


def clip_advantages(
    advantages: Float[Array, " B"], clip: float, kind: Advantage | Literal["running"]
) -> Float[Array, " B"]:
    """Clip advantages to `clip` standard deviations, both ways.

    Most kinds are in standard deviations. `group_mean` and `leave_one_out` are in the reward's
    units, in which no bound would suit all rewards; of them it is the batch's: √(mean A²).

    Args:
        advantages: [B].
        clip: above 0; infinite for none.
        kind: as in `group_advantages`, or `running`.

    Returns:
        [B].
    """
    if math.isinf(clip):
        return advantages
    unit = _std(advantages) if kind in ("group_mean", "leave_one_out") else 1.0
    return jnp.clip(advantages, -clip * unit, clip * unit)


class RewardHistory(NamedTuple):
    """The last S rewards of each of N prompts, for running advantages.

    Attributes:
        values: float32 `[N, S]`, written around: the n-th reward of a prompt is at n mod S.
        counts: int32 `[N]`, how many rewards each prompt has had.
    """

    values: Any
    counts: Any

    @classmethod
    def empty(cls, num_prompts: int, size: int) -> RewardHistory:
        """Return the history of `num_prompts` prompts that were never scored."""
        return cls(np.zeros((num_prompts, size), np.float32), np.zeros(num_prompts, np.int32))


def running_advantages(
    rewards: Float[Any, " B"],
    prompt_index: Int[Any, " B"],
    history: RewardHistory,
    *,
    min_count: int = 16,
    eps: float = 1e-8,
) -> tuple[Float[Array, " B"], RewardHistory]:
    """Compare each reward with the last ones of its prompt: (r − mean) / (std + eps).

    The batch's rewards enter the history first. Mean and population std are those of the prompt's
    last S rewards, or of the whole batch while the prompt has had fewer than `min_count`. Source:
    DDPO (Black et al. 2023), per-prompt statistics. Rewards from before an improvement stay in the
    mean, so that a whole group may get advantages of one sign; a group is exactly 0 where it equals
    its prompt's history.

    Args:
        rewards: [B].
        prompt_index: [B], each image's prompt by its place in the prompt list.
        history: of the iterations before.
        min_count: rewards of a prompt from which on its own statistics are used.
        eps: in units of the reward.

    Returns:
        Advantages [B], float32, and the history with the new rewards.
    """
    scores, prompts = np.asarray(rewards, np.float32), np.asarray(prompt_index)
    values, counts = np.array(history.values, np.float32), np.array(history.counts, np.int32)
    size = values.shape[1]
    for score, prompt in zip(scores, prompts, strict=True):
        values[prompt, counts[prompt] % size] = score
        counts[prompt] += 1
    # A sum of float32 numbers is exact in float64 (for fewer than 2²⁹ of about one magnitude), so
    # equal rewards have themselves as their mean, to the bit.
    batch = scores.astype(np.float64)
    advantages = np.empty_like(batch)
    for prompt in np.unique(prompts):
        known = min(int(counts[prompt]), size)
        basis = batch if known < min_count else values[prompt, :known].astype(np.float64)
        rows = prompts == prompt
        advantages[rows] = (batch[rows] - basis.mean()) / (basis.std() + eps)
    return jnp.asarray(advantages, jnp.float32), RewardHistory(values, counts)


def best_and_worst(
    advantages: Float[Array, " B"], group_size: int, count: int
) -> Int[np.ndarray, " S"]:
    """Choose the `count` best and the `count` worst images of each group.

    The advantages are those of the whole group; the images between learn little and cost as much.

    Args:
        advantages: [P·G], group by group.
        group_size: G.
        count: k, with 2k ≤ G.

    Returns:
        Places of the chosen images, [P·2k], group by group and in order within a group. Equal
        advantages are chosen by place.

    Raises:
        UsageError: 2k is above G, or k below 1.
    """
    groups = np.asarray(_grouped(advantages, group_size))
    if not 1 <= count <= group_size // 2:
        raise UsageError(
            f"{count} best and {count} worst images of a group of {group_size}; expected 1 to "
            f"{group_size // 2} of each"
        )
    order = np.argsort(groups, axis=1, kind="stable")
    chosen = np.sort(np.concatenate([order[:, :count], order[:, -count:]], axis=1), axis=1)
    return (chosen + group_size * np.arange(len(groups))[:, None]).reshape(-1)


def discounts(gamma: float, num_steps: int) -> Float[Array, " T"]:
    """Return γ^(steps remaining) of each denoising step: 1 for the last, γ^(T−1) for the first.

    The factor of a step's advantage where each step has a ratio of its own: the reward comes after
    the last step.

    Args:
        gamma: γ in (0, 1]; 1 is no discount.
        num_steps: T.

    Returns:
        float32 [T].
    """
    return jnp.asarray(float(gamma) ** np.arange(num_steps - 1, -1, -1), jnp.float32)
