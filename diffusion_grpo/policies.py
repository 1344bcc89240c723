"""What the generic trainer sees of a policy and its samples: numbers that fit each other."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError, suggest

ALIASES = {"observations": "states", "log_probs": "old_log_probs"}
REQUIRED = ("states", "actions", "old_log_probs", "rewards")
OPTIONAL = ("ref_log_probs", "group_size")


class Samples(NamedTuple):
    """B samples, group by group.

    Attributes:
        states: `[B, ...]`, or a pytree of such arrays.
        actions: integers `[B]` or `[B, L]` for logits; whatever the policy's `log_prob` takes.
        old_log_probs: log π_old, nats, `[B]`.
        rewards: `[B]`, or `[B, L]` one a step.
        ref_log_probs: log π_ref, nats, `[B]`, or None.
    """

    states: Any
    actions: Any
    old_log_probs: Any
    rewards: Any
    ref_log_probs: Any


def check_policy(policy: Any, name: str) -> None:
    """Raise UsageError unless the trainer can use it as a policy."""
    if not isinstance(policy, nnx.Module) or not (callable(policy) or hasattr(policy, "log_prob")):
        raise UsageError(
            f"{name} is {type(policy).__name__}; expected an nnx.Module that is called on states "
            "and returns logits, or has a method log_prob(states, actions)"
        )


def make_samples(
    states: Any,
    actions: Any,
    old_log_probs: Any,
    rewards: Any,
    ref_log_probs: Any = None,
    *,
    discrete: bool,
) -> Samples:
    """Return what a caller gives (JAX, NumPy, lists) as arrays that fit each other.

    Args:
        states: see `Samples`, as the other arrays.
        actions: `[B, ...]`.
        old_log_probs: `[B]`.
        rewards: `[B]` or `[B, L]`.
        ref_log_probs: `[B]` or None.
        discrete: whether the policy returns logits, so that the actions must be integers.

    Raises:
        UsageError: shapes or dtypes do not fit.
    """
    values = float_array(rewards, "rewards")
    if values.ndim not in (1, 2) or 0 in values.shape:
        raise UsageError(
            f"rewards are {values.shape}; expected [B], or [B, L] with one reward a step"
        )
    count = values.shape[0]
    actions = _arrays(actions, "actions", count)
    dtype = getattr(actions, "dtype", None)
    if discrete and (dtype is None or not jnp.issubdtype(dtype, jnp.integer)):
        raise UsageError(
            f"actions are {dtype or type(actions).__name__}; expected integers, since the policy "
            "returns logits: over other actions it needs a method log_prob(states, actions)"
        )
    old = _log_probs(old_log_probs, "old_log_probs", count)
    ref = None if ref_log_probs is None else _log_probs(ref_log_probs, "ref_log_probs", count)
    return Samples(_arrays(states, "states", count), actions, old, values, ref)


def check_group_size(given: Any, num_generations: int, count: int) -> int:
    """Return G: the batch's own group size, or the constructor's where it has none (None).

    Raises:
        UsageError: not an integer of at least 2 that divides the number of samples.
    """
    if given is None:
        if count % num_generations:
            raise UsageError(
                f"the batch has {count} samples, which do not divide into groups of "
                f"num_generations = {num_generations}; expected a multiple, laid out group by "
                "group, or the batch's own group_size where it differs"
            )
        return num_generations
    try:
        size = operator.index(given)
    except TypeError:
        raise UsageError(f"group_size is {given!r}; expected an integer") from None
    if size < 2 or count % size:
        raise UsageError(
            f"group_size is {size} for a batch of {count} samples; expected 2 or more, and a "
            "divisor of the batch"
        )
    return size


def named_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with aliases replaced by the names of `Samples`.

    Raises:
        UsageError: a key is missing, unknown, or given under both its names.
    """
    known = (*REQUIRED, *ALIASES, *OPTIONAL)
    named: dict[str, Any] = {}
    for key, value in batch.items():
        if key not in known:
            raise UsageError(
                f"batch key {key!r} is unknown{suggest(str(key), known)}; expected "
                f"{', '.join(known)}"
            )
        name = ALIASES.get(key, key)
        if name in named:
            alias = next(alias for alias, of in ALIASES.items() if of == name)
            raise UsageError(f"batch has both {name!r} and its alias {alias!r}; expected one")
        named[name] = value
    if missing := [key for key in REQUIRED if named.get(key) is None]:
        raise UsageError(f"batch has no {', '.join(missing)}; it has {', '.join(batch) or 'none'}")
    return named


def suspects(batch: Samples) -> str:
    """Say what of the batch explains a loss that is not finite."""
    values = {"rewards": batch.rewards, "old_log_probs": batch.old_log_probs}
    if batch.ref_log_probs is not None:
        values["ref_log_probs"] = batch.ref_log_probs
    found = [name for name, value in values.items() if not jnp.isfinite(value).all()]
    if found:
        return f"Not finite in the batch: {', '.join(found)}"
    return "Likely: actions outside 0 … n−1, or too high a learning rate"


def sampled_entropy(
    log_probs: Float[Array, " B"], old_log_probs: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Estimate the entropy of π_θ from samples of π_old, unbiased in value and in gradient.

    H = −E_old[ρ log π_θ], hence −ρ (log π_θ − b − 1) − (b + 1) with any b that the sample has no
    part in; b, the mean log π_old of the other samples, keeps the gradient's variance small:
    −ρ (log π_θ − b) ∇ log π_θ. The plain −log π_θ would have a gradient of expectation 0.

    Args:
        log_probs: log π_θ, nats.
        old_log_probs: log π_old of the same actions.
    """
    others = (old_log_probs.sum() - old_log_probs) / (old_log_probs.shape[0] - 1)
    ratio = jnp.exp(log_probs - old_log_probs)
    return -ratio * (log_probs - others - 1) - (others + 1)


def evaluate(policy: Any, batch: Samples, name: str) -> tuple[Array, Array]:
    """Return log π(a|s) and the entropy of π(·|s), `[B]` in nats, float32.

    Raises:
        UsageError: the policy's output does not fit the batch.
    """
    states, actions, old_log_probs, rewards, _ = batch
    count = rewards.shape[0]
    log_prob, entropy = (getattr(policy, method, None) for method in ("log_prob", "entropy"))
    if log_prob is not None:
        log_probs = _fit(log_prob(states, actions), f"{name}'s log_prob(states, actions)", count)
        if entropy is None:
            return log_probs, sampled_entropy(log_probs, old_log_probs)
        return log_probs, _fit(entropy(states), f"{name}'s entropy(states)", count)
    logits = policy(states)
    shape = getattr(logits, "shape", ())
    if len(shape) not in (2, 3) or shape[:-1] != actions.shape:
        raise UsageError(
            f"{name} returns {shape or type(logits).__name__} for actions {actions.shape}; "
            "expected logits [B, n] for actions [B], or [B, L, n] for actions [B, L]"
        )
    log_softmax = jax.nn.log_softmax(logits.astype(jnp.float32))
    # An action that does not exist gets NaN, which train_step refuses; −1 would be the last one.
    index = jnp.where(actions < 0, logits.shape[-1], actions.astype(jnp.int32))[..., None]
    log_probs = jnp.take_along_axis(log_softmax, index, -1, mode="fill", fill_value=jnp.nan)
    # p log p is 0 at p = 0, where a logit of −inf (a masked action) would give 0 · −inf.
    terms = jnp.exp(log_softmax) * jnp.where(jnp.isneginf(log_softmax), 0.0, log_softmax)
    return log_probs.reshape(count, -1).sum(axis=1), -terms.reshape(count, -1).sum(axis=1)


def _fit(values: Any, name: str, count: int) -> Array:
    if getattr(values, "shape", None) != (count,):
        raise UsageError(
            f"{name} returns {getattr(values, 'shape', type(values).__name__)}; expected "
            f"{(count,)}, one number a sample: sum over the axes of an action"
        )
    return values.astype(jnp.float32)


def _array(value: Any, name: str) -> Array:
    try:
        return value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: expected an array of numbers; {error}") from error


def _arrays(tree: Any, name: str, count: int) -> Any:
    """Return a pytree's leaves as arrays `[B, ...]`; a list is an array, not a pytree."""
    if isinstance(tree, list):
        tree = np.asarray(tree)
    tree = jax.tree.map(lambda leaf: _array(leaf, name), tree)
    leaves = jax.tree.leaves(tree)
    wrong = [leaf.shape for leaf in leaves if leaf.shape[:1] != (count,)]
    if wrong or not leaves:
        raise UsageError(
            f"{name} are {wrong[0] if wrong else tree}; expected [{count}, ...] as there are "
            f"{count} rewards"
        )
    return tree


def float_array(value: Any, name: str) -> Array:
    """Return real numbers as float32; raises UsageError where they are not."""
    array = _array(value, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise UsageError(f"{name} are {array.dtype}; expected real numbers")
    return array.astype(jnp.float32)


def _log_probs(value: Any, name: str, count: int) -> Array:
    array = float_array(value, name)
    if array.shape != (count,):
        raise UsageError(
            f"{name} are {array.shape}; expected {(count,)}, one a sample as the rewards: sum over "
            "the axes of an action"
        )
    return array
