"""The loss of GRPO over recorded trajectories, as programs of one microbatch.

Given the recorded latents, the T denoising steps are independent. So the gradient of a
trajectory-ratio loss is Σ_t w_t (∂L/∂log ρ) ∇ log π_θ(x_s|x_t) with one scalar ∂L/∂log ρ an image,
known once the sum over the steps is. One program differentiates one step of one microbatch;
`update.py` calls it for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_grpo.accumulation import EXTREMES, divide, of_shards, ratio_metrics
from diffusion_grpo.gaussian import Reduction, gaussian_entropy, gaussian_kl, gaussian_log_prob
from diffusion_grpo.grpo import (
    clipped_surrogate,
    guarded_log_ratio,
    kl_estimate,
    masked_surrogate,
)
from diffusion_grpo.mesh import (
    Place,
    by_rows,
    partial_sums,
    replicated,
    shards,
    total_of,
)
from diffusion_grpo.program_cache import network_jit
from diffusion_grpo.rollout import Denoiser, denoising_step
from diffusion_grpo.schedule import Schedule
from diffusion_grpo.steps import Ratio, StepPlan
from diffusion_grpo.trajectories import (
    ESTIMATORS,
    KL,
    UpdateBatch,
    averaged_elements,
    latent_elements,
    step_kl,
)

# (trained parameters, frozen parameters) → the policy's denoiser
Policy = Callable[[Any, Any], Denoiser]

# (trained parameters, schedule) → the schedule with the policy's own noise
Noise = Callable[[Any, Schedule], Schedule]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What the update computes; every field is static in the compiled program.

    Attributes:
        ratio: one ratio an image, of the weighted sum of log-probs, or one a step.
        ratio_base: the denominator: the policy that sampled, or the frozen reference.
        reduction: of a step's log-prob (and KL) over the latent.
        kl: the KL to the reference in the loss; None leaves it out.
        entropy_coeff: weight of the entropy of the steps.
        guard: GRPO-Guard's normalization of a step's ratio.
        dppo_kl: DPPO's mask instead of clipping, dropping a step whose KL to the ratio's base is
            above this; None clips.
        learned_noise: the policy has a noise of its own, which the reference has not.
        microbatch: images differentiated at a time.
    """

    ratio: Ratio = "trajectory"
    ratio_base: Literal["old", "reference"] = "old"
    reduction: Reduction = "mean"
    kl: KL | None = None
    entropy_coeff: float = 0.0
    guard: bool = False
    dppo_kl: float | None = None
    learned_noise: bool = False
    microbatch: int = 8

    @property
    def needs_reference_means(self) -> bool:
        """Whether the loss reads μ_ref."""
        return self.kl in ("exact", "flow_grpo") or self._compares_means("reference")

    @property
    def needs_reference_log_probs(self) -> bool:
        """Whether the loss reads log π_ref."""
        return self.kl in ESTIMATORS or self.ratio_base == "reference"

    @property
    def needs_old_means(self) -> bool:
        """Whether the loss reads μ_old."""
        return self._compares_means("old")

    @property
    def sums_log_ratios(self) -> bool:
        """Whether the loss depends on sums of log-ratios over the steps."""
        return self.ratio == "trajectory" or self.kl in ESTIMATORS

    def sweeps(self, updates: int) -> tuple[int, int]:
        """Return how often an iteration evaluates the active steps without a gradient.

        Args:
            updates: optimizer steps an iteration.

        Returns:
            By the policy as it moves, `microbatch` images at a time: once an update after the
            first. And by the policies that the loss compares it to, once an iteration each.
        """
        moving = updates - 1 if self.sums_log_ratios else 0
        reference = self.needs_reference_means or self.needs_reference_log_probs
        return moving, int(reference) + int(self.needs_old_means)

    def _compares_means(self, base: str) -> bool:
        return (self.guard or self.dppo_kl is not None) and self.ratio_base == base


class Pulls(NamedTuple):
    """What every step's log-prob of an image is multiplied by in the loss, `[b]` each.

    Attributes:
        ratio: ∂L/∂log ρ of the trajectory's ratio.
        kl: β ∂KL/∂δ of an estimator of the summed log-ratio.
        log_ratio: Σ_t w_t (log π_θ − log π_old), before it was differentiated.
    """

    ratio: Any
    kl: Any
    log_ratio: Any


class Shares(NamedTuple):
    """What one of the K differentiated steps counts for, so that K of A are unbiased.

    Attributes:
        total: A/K, in a sum over the A steps.
        mean: 1/K, in a mean over them.
    """

    total: Any
    mean: Any


class CompiledLoss(NamedTuple):
    """The compiled programs of the loss; see `compile_loss`.

    Attributes:
        config: what they compute.
        terms: of a microbatch, what depends on sums over the steps: `Pulls` and metrics.
        accumulate: adds the gradient of one step of a microbatch.
        entropy: that of the active steps, summed.
        place: lays the gradient out over the devices.
    """

    config: LossConfig
    terms: Any
    accumulate: Any
    entropy: Any
    place: Place = replicated

    @property
    def local(self) -> bool:
        """Whether each device sums the gradient of its own images, until all are added up."""
        return _sums_by_device(self.place)

    def zeros(self, params: Any) -> Any:
        """Return the gradient that `accumulate` adds the first step to."""
        return partial_sums(params) if self.local else jax.tree.map(jnp.zeros_like, params)

    def mean(self, gradient: Any, count: int) -> Any:
        """Return the accumulated gradient over `count`, the number of images; it is donated."""
        return divide(total_of(gradient) if self.local else gradient, jnp.float32(count))


def _sums_by_device(place: Place) -> bool:
    return place is replicated and shards() > 1


def _fixed_noise(params: Any, schedule: Schedule) -> Schedule:
    del params
    return schedule


def compile_loss(
    policy: Policy,
    config: LossConfig,
    noise: Noise = _fixed_noise,
    *,
    place: Place = replicated,
) -> CompiledLoss:
    """Compile the programs that the gradient and its metrics are made of.

    `terms` sums a microbatch's log-ratios over the steps (by a forward sweep, or without one on the
    first update, where they are known) and differentiates what depends on the sum. `accumulate`
    differentiates one step of one microbatch and adds to the gradient, which is donated. `entropy`
    is for the metrics alone: its gradient is in `accumulate`'s.

    Args:
        policy: (trained, frozen parameters) → denoiser.
        config: see `LossConfig`.
        noise: (trained parameters, schedule) → schedule, for a learned noise scale.
        place: lays the gradient out over the devices, as the trained parameters are.
    """

    def log_prob(
        params: Any, frozen: Any, schedule: Schedule, mb: UpdateBatch, i: Array
    ) -> tuple[Array, Array, Array]:
        x_t, x_s = mb.trajectory.latents[i], mb.trajectory.latents[i + 1]
        denoiser, noisy = policy(params, frozen), noise(params, schedule)
        mean, std = denoising_step(denoiser, noisy, i, x_t, mb.conditioning)
        return gaussian_log_prob(x_s, mean, std, reduction=config.reduction), mean, std

    def elements(mb: UpdateBatch) -> int:
        return averaged_elements(config.reduction, mb.trajectory.latents)

    def surrogate(log_ratio: Array, advantages: Array, plan: StepPlan) -> tuple[Array, Array]:
        loss, clipped = clipped_surrogate(
            log_ratio,
            advantages,
            clip_low=plan.clip_low,
            clip_high=plan.clip_high,
            dual_clip=plan.dual_clip,
        )
        return loss.sum(), clipped

    def to_reference(mb: UpdateBatch, active: Array, weights: Array | None = None) -> Array:
        """Σ_t w_t (log π_old − log π_ref), from what is recorded."""
        gap = (mb.trajectory.log_probs - mb.reference.log_probs)[active]
        return (gap if weights is None else gap * weights[active][:, None]).sum(axis=0)

    @partial(network_jit, static_argnames="on_policy")
    def terms(
        params: Any,
        frozen: Any,
        schedule: Schedule,
        mb: UpdateBatch,
        plan: StepPlan,
        beta: Array,
        *,
        on_policy: bool,
    ) -> tuple[Pulls, dict[str, Array]]:
        zero = jnp.zeros_like(mb.advantages)
        weighted, plain = zero, zero  # Σ w_t and Σ of log π_θ − log π_old
        if not on_policy:

            def sweep(sums: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
                log_p, _, _ = log_prob(params, frozen, schedule, mb, i)
                change = log_p - mb.trajectory.log_probs[i]
                return (sums[0] + plan.weights[i] * change, sums[1] + change), None

            (weighted, plain), _ = jax.lax.scan(sweep, (zero, zero), plan.active)
        pull, kl_pull, metrics, kind = zero, zero, {}, config.kl
        if config.ratio == "trajectory":
            log_ratio = weighted
            if config.ratio_base == "reference":
                log_ratio = log_ratio + to_reference(mb, plan.active, plan.weights)
            (loss, clipped), pull = jax.value_and_grad(surrogate, has_aux=True)(
                log_ratio, mb.advantages, plan
            )
            metrics = ratio_metrics(log_ratio, clipped, plain, elements(mb))
            metrics |= {"policy_loss": loss}
        if kind in ESTIMATORS:
            kl, kl_pull = jax.value_and_grad(
                lambda delta: kl_estimate(delta, kind, elements=elements(mb)).sum()
            )(plain + to_reference(mb, plan.active))
            kl_pull = beta * kl_pull
            metrics = metrics | {"kl": kl}
        return by_rows(Pulls(pull, kl_pull, weighted)), replicated(metrics)

    def to_means(mean: Array, std: Array, schedule: Schedule, mb: UpdateBatch, i: Array) -> Array:
        """KL of one step to the reference, by the means; `[b]`."""
        return step_kl(
            mean,
            std,
            mb.reference.means[i],
            schedule,
            i,
            kind=config.kl or "exact",
            reduction=config.reduction,
            learned_noise=config.learned_noise,
        )

    def step_surrogate(
        log_p: Array, mean: Array, std: Array, mb: UpdateBatch, plan: StepPlan, i: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of one step that has a ratio of its own, summed over the images."""
        from_old = log_ratio = log_p - mb.trajectory.log_probs[i]
        base = mb.old
        if config.ratio_base == "reference":
            log_ratio, base = log_p - mb.reference.log_probs[i], mb.reference
        advantages = plan.discounts[i] * mb.advantages
        if config.guard or config.dppo_kl is not None:
            divergence = gaussian_kl(mean, base.means[i], std, reduction=config.reduction)
            if config.guard:
                log_ratio = guarded_log_ratio(log_ratio, divergence, std)
        if config.dppo_kl is not None:
            losses, clipped = masked_surrogate(
                log_ratio, advantages, divergence, limit=config.dppo_kl
            )
            loss = losses.sum()
        else:
            loss, clipped = surrogate(log_ratio, advantages, plan)
        loss = plan.weights[i] * loss
        metrics = ratio_metrics(log_ratio, clipped, from_old, elements(mb))
        return loss, metrics | {"policy_loss": loss}

    @partial(network_jit, donate_argnums=0)
    def accumulate(
        gradient: Any,
        params: Any,
        frozen: Any,
        schedule: Schedule,
        mb: UpdateBatch,
        plan: StepPlan,
        beta: Array,
        i: Array,
        pulls: Pulls,
        shares: Shares,
    ) -> tuple[Any, dict[str, Array], Array]:
        """Add one step's gradient; returns its metrics and log π_θ − log π_old `[b]` too."""

        def step_loss(
            params: Any, mb: UpdateBatch, pulls: Pulls
        ) -> tuple[Array, tuple[dict[str, Array], Array]]:
            log_p, mean, std = log_prob(params, frozen, schedule, mb, i)
            metrics = {}
            if config.ratio == "trajectory":
                loss = shares.total * plan.weights[i] * (pulls.ratio * log_p).sum()
            else:
                value, metrics = step_surrogate(log_p, mean, std, mb, plan, i)
                loss = shares.mean * value
                metrics = {k: v if k in EXTREMES else shares.mean * v for k, v in metrics.items()}
            if config.kl in ESTIMATORS:
                loss = loss + shares.total * (pulls.kl * log_p).sum()
            elif config.kl is not None:
                # The exact KL is a sum over the steps; Flow-GRPO's a mean over them.
                share = shares.mean if config.kl == "flow_grpo" else shares.total
                kl = share * to_means(mean, std, schedule, mb, i).sum()
                loss, metrics = loss + beta * kl, metrics | {"kl": kl}
            if config.entropy_coeff:
                size = latent_elements(mb.trajectory.latents)
                entropy = gaussian_entropy(std, size, reduction=config.reduction)
                count = jnp.float32(mb.advantages.shape[0])
                loss = loss - shares.total * count * config.entropy_coeff * entropy
            return loss, (metrics, log_p - mb.trajectory.log_probs[i])

        if _sums_by_device(place):
            return of_shards(step_loss, gradient, params, mb, pulls)
        new, (metrics, change) = jax.grad(partial(step_loss, mb=mb, pulls=pulls), has_aux=True)(
            params
        )
        return place(jax.tree.map(jnp.add, gradient, new)), replicated(metrics), change

    @jax.jit
    def entropy(params: Any, schedule: Schedule, mb: UpdateBatch, active: Array) -> Array:
        std, size = noise(params, schedule).std[active], latent_elements(mb.trajectory.latents)
        return gaussian_entropy(std, size, reduction=config.reduction).sum()

    return CompiledLoss(config, terms, accumulate, entropy, place)
