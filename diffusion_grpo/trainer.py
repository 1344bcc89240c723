"""GRPO for any Flax NNX policy: discrete logits, or a `log_prob` method of its own.

Nothing here knows of diffusion, and nothing of GRPO is written twice: advantages, surrogate and KL
are those of `grpo.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError
from diffusion_grpo.grpo import clipped_surrogate, group_advantages, kl_estimate
from diffusion_grpo.policies import (
    Samples,
    check_group_size,
    check_policy,
    evaluate,
    float_array,
    make_samples,
    named_batch,
    suspects,
)

Metrics = dict[str, Array]


@dataclass(frozen=True)
class GRPOConfig:
    """What the generic trainer optimizes; symbols as in Shao et al. 2024, eq. 3 and 4.

    Raises:
        UsageError: a value is out of its range.
    """

    num_generations: int = 4
    """G, the samples a group: those of one question (state), compared with each other; ≥ 2."""

    clip_param: float = 0.2
    """ε, in (0, 1): a sample stops teaching once its ratio left [1−ε, 1+ε] the way it pushes."""

    beta: float = 0.01
    """β ≥ 0, weight of the KL to the reference policy; larger stays closer, 0 needs none."""

    entropy_coeff: float = 0.01
    """c₂ ≥ 0 of PPO (Schulman et al. 2017, eq. 9), weight of the policy's entropy H in the loss
    (−c₂ H); larger explores more, 0 leaves it out."""

    gamma: float = 0.99
    """γ in [0, 1], the discount of rewards given a step, `[B, L]`: the return is Σ_l γ^l r_l. One
    reward a sample, `[B]`, is taken as it is."""

    def __post_init__(self) -> None:
        """Reject what cannot be meant."""
        if isinstance(self.num_generations, bool) or not isinstance(self.num_generations, int):
            raise UsageError(f"num_generations is {self.num_generations!r}; expected an integer")
        if self.num_generations < 2:
            raise UsageError(
                f"num_generations is {self.num_generations}; expected 2 or more, since a group's "
                "rewards are compared with each other"
            )
        if not 0 < self.clip_param < 1:
            raise UsageError(
                f"clip_param is {self.clip_param}; expected a number between 0 and 1, as 0.2 for "
                "ratios within [0.8, 1.2]"
            )
        for name in ("beta", "entropy_coeff"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} is {value}; expected 0 (off) or a positive number")
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"gamma is {self.gamma}; expected a number from 0 to 1")


DEFAULTS = GRPOConfig()


class GRPOTrainer:
    """Train a policy with GRPO on batches that the caller samples and scores.

    Minimizes mean(max(−A ρ, −A clip(ρ, 1−ε, 1+ε))) + β·KL − c₂·H over the batch, with
    A = (r − mean)/(std + eps) within a group and ρ = π_θ(a|s)/π_old(a|s).

    The KL is Schulman's k3 on the sampled actions, e^(−δ) − 1 + δ with δ = log π_θ − log π_ref: an
    unbiased estimate of KL(π_θ ‖ π_ref) where the policy sampled the actions itself, never
    negative. As in GRPO's paper it is differentiated as it stands, which in expectation is the
    gradient of KL(π_ref ‖ π_θ).

    Attributes:
        model: the policy; holds the new parameters after every step.
        optimizer: the `nnx.Optimizer`, and in it the optimizer's state.
        config: see `GRPOConfig`.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation | nnx.Optimizer,
        config: GRPOConfig = DEFAULTS,
        reference_model: nnx.Module | None = None,
    ) -> None:
        """Bind a policy to an optimizer.

        Args:
            model: either called on states and returns logits over discrete actions, `[B, n]` for
                actions `[B]`, or `[B, L, n]` for sequences of L actions `[B, L]`, whose log-probs
                and entropies are summed over L: a sequence is one action with one ratio. Or has a
                method `log_prob(states, actions) -> [B]`, then used instead, and optionally
                `entropy(states) -> [B]`; without it the entropy is estimated from the samples
                (`sampled_entropy`). Its structure is fixed here; its values are read at every step.
            optimizer: Optax's transformation, which trains all `nnx.Param`, or an `nnx.Optimizer`
                of this model, which trains what its `wrt` names.
            config: see `GRPOConfig`; `num_generations` is the group size of every batch that does
                not bring its own.
            reference_model: π_ref, of either form; frozen as it is now, so `model` itself stands
                for the policy before training.

        Raises:
            UsageError: not a policy, or the optimizer is of another model.
        """
        if not isinstance(config, GRPOConfig):
            raise UsageError(f"config is {type(config).__name__}; expected a GRPOConfig")
        check_policy(model, "model")
        if isinstance(optimizer, optax.GradientTransformation):
            optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        elif not isinstance(optimizer, nnx.Optimizer):
            raise UsageError(
                f"optimizer is {type(optimizer).__name__}; expected an Optax transformation, as "
                "optax.adam(1e-3), or an nnx.Optimizer of the model"
            )
        self.model = model
        self.optimizer = optimizer
        self.config = config
        graphdef, params, _ = self._split()
        if not jax.tree.leaves(params):
            raise UsageError("model has no parameter to train; expected an nnx.Param at least")
        if _shapes(jax.eval_shape(optimizer.tx.init, params)) != _shapes(self._opt_state()):
            raise UsageError(
                "optimizer's state does not fit the model's parameters; expected an nnx.Optimizer "
                "made of this model"
            )
        reference_graphdef, self._reference = None, None
        if reference_model is not None:
            check_policy(reference_model, "reference_model")
            reference_graphdef, state = nnx.split(reference_model)
            self._reference = nnx.as_pure(state)
        loss = functools.partial(_loss, config, optimizer.wrt, graphdef, reference_graphdef)
        self._loss = jax.jit(loss, static_argnums=0)
        self._step = jax.jit(functools.partial(_step, loss, optimizer.tx), static_argnums=0)

    def normalize_group_rewards(
        self, rewards: Any, group_size: int, eps: float = 1e-8
    ) -> Float[Array, " B"]:
        """Return (r − mean)/(std + eps) within each group; exactly 0 where all are equal.

        Args:
            rewards: `[B]`, group by group.
            group_size: G, at least 2.
            eps: in units of the reward.

        Raises:
            UsageError: the rewards are not `[B]`, or do not divide into groups.
        """
        values = float_array(rewards, "rewards")
        if values.ndim != 1:
            raise UsageError(f"rewards are {values.shape}; expected [B], group by group")
        return group_advantages(values, group_size, eps=eps)

    def compute_loss(
        self,
        states: Any,
        actions: Any,
        old_log_probs: Any,
        rewards: Any,
        group_size: int | None = None,
        ref_log_probs: Any = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss at the model's present parameters, and metrics; changes nothing.

        Args:
            states: `[B, ...]`, group by group, or a pytree of such arrays.
            actions: integers `[B]` or `[B, L]` for logits; whatever `log_prob` takes otherwise.
            old_log_probs: log π_old(a|s) of the policy that sampled, in nats, `[B]`.
            rewards: `[B]`, or `[B, L]` one a step (see `GRPOConfig.gamma`).
            group_size: G of this batch; None for the config's `num_generations`.
            ref_log_probs: log π_ref(a|s), `[B]`; used instead of the reference model's.

        Returns:
            The loss, and scalars: `policy_loss` (the surrogate), `kl_penalty` (β·KL to the
            reference, 0 for β = 0), `entropy` (H, nats; loss = policy_loss + kl_penalty −
            entropy_coeff·entropy), `approx_kl` (KL(π_old ‖ π_θ), k3), `clip_fraction` (share of
            samples without a gradient for it), `ratio_mean` (of ρ).

        Raises:
            UsageError: shapes or the group size do not fit, or β > 0 and there is no reference.
        """
        arrays = (states, actions, old_log_probs, rewards, ref_log_probs)
        batch, size = self._samples(*arrays, group_size=group_size)
        _, params, rest = self._split()
        loss, (metrics, _) = self._loss(size, params, rest, self._reference, batch)
        return loss, metrics

    def train_step(self, batch: Mapping[str, Any]) -> tuple[Float[Array, ""], Metrics]:
        """Take one optimizer step; the model holds the new parameters afterwards.

        Args:
            batch: `states` (or `observations`), `actions`, `old_log_probs` (or `log_probs`),
                `rewards`, and optionally `ref_log_probs` and `group_size`; see `compute_loss`. Not
                inside a `jit`: the step is compiled here, once for every shape and group size.

        Returns:
            Loss and metrics before the step, as `compute_loss`.

        Raises:
            UsageError: a key is missing, unknown or given under both names, or as `compute_loss`.
            FloatingPointError: loss or gradient is not finite; model and optimizer are unchanged.
        """
        named = named_batch(batch)
        arrays = (named.get(field) for field in Samples._fields)
        data, size = self._samples(*arrays, group_size=named.get("group_size"))
        _, params, rest = self._split()
        finite, params, opt_state, rest, loss, metrics = self._step(
            size, params, self._opt_state(), rest, self._reference, data
        )
        if not finite:
            raise FloatingPointError(
                f"the loss ({float(loss):g}) or its gradient is not finite at step "
                f"{int(self.optimizer.step[...])}; nothing was changed. {suspects(data)}"
            )
        nnx.update(self.model, params, rest)
        nnx.update(self.optimizer.opt_state, nnx.state(opt_state))
        self.optimizer.step[...] += 1
        return loss, metrics

    def _split(self) -> tuple[Any, Any, Any]:
        graphdef, params, rest = nnx.split(self.model, self.optimizer.wrt, ...)
        return graphdef, nnx.as_pure(params), nnx.as_pure(rest)

    def _opt_state(self) -> Any:
        return nnx.as_pure(self.optimizer.opt_state)

    def _samples(self, *arrays: Any, group_size: Any) -> tuple[Samples, int]:
        samples = make_samples(*arrays, discrete=not hasattr(self.model, "log_prob"))
        size = check_group_size(group_size, self.config.num_generations, len(samples.rewards))
        if self.config.beta and self._reference is None and samples.ref_log_probs is None:
            raise UsageError(
                f"beta is {self.config.beta}, and there is no reference to take the KL to; expected"
                " GRPOTrainer(..., reference_model=...), ref_log_probs in the batch, or "
                "GRPOConfig(beta=0)"
            )
        return samples, size


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _loss(
    config: GRPOConfig,
    wrt: Any,
    graphdef: Any,
    reference_graphdef: Any,
    group_size: int,
    params: Any,
    rest: Any,
    reference: Any,
    batch: Samples,
) -> tuple[Array, tuple[Metrics, Any]]:
    """Return the loss, metrics, and the state beside the parameters as the policy left it."""
    policy = nnx.merge(graphdef, params, rest)
    log_probs, entropies = evaluate(policy, batch, "the policy")
    log_ratio = log_probs - batch.old_log_probs
    rewards = batch.rewards
    if rewards.ndim == 2:
        discounts = config.gamma ** jnp.arange(rewards.shape[1], dtype=jnp.float32)
        rewards = (rewards * discounts[None]).sum(axis=1)
    losses, clipped = clipped_surrogate(
        log_ratio,
        group_advantages(rewards, group_size),
        clip_low=config.clip_param,
        clip_high=config.clip_param,
    )
    entropy = entropies.mean()
    penalty = jnp.zeros((), jnp.float32)
    if config.beta:
        ref_log_probs = batch.ref_log_probs
        if ref_log_probs is None:
            frozen = nnx.merge(reference_graphdef, reference)
            ref_log_probs = evaluate(frozen, batch, "the reference")[0]
        delta = log_probs - jax.lax.stop_gradient(ref_log_probs)
        penalty = config.beta * kl_estimate(delta, "k3").mean()
    loss = losses.mean() + penalty
    if config.entropy_coeff:
        loss = loss - config.entropy_coeff * entropy
    metrics = {
        "policy_loss": losses.mean(),
        # The samples are the old policy's, so δ = log π_old − log π_θ.
        "approx_kl": kl_estimate(-log_ratio, "k3").mean(),
        "kl_penalty": penalty,
        "entropy": entropy,
        "clip_fraction": clipped.astype(jnp.float32).mean(),
        "ratio_mean": jnp.exp(log_ratio).mean(),
    }
    return loss, (metrics, nnx.as_pure(nnx.split(policy, wrt, ...)[2]))


def _step(
    loss: Any,
    tx: optax.GradientTransformation,
    group_size: int,
    params: Any,
    opt_state: Any,
    rest: Any,
    reference: Any,
    batch: Samples,
) -> tuple[Array, Any, Any, Any, Array, Metrics]:
    """Return whether all is finite, new parameters, optimizer state, rest; loss and metrics."""
    (value, (metrics, rest)), gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)(
        group_size, params, rest, reference, batch
    )
    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
    # Optax raises a float to an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        changes, opt_state = tx.update(gradient, opt_state, params)
    return finite, optax.apply_updates(params, changes), opt_state, rest, value, metrics
