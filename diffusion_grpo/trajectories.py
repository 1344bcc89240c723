"""The trajectories that an update learns from, and what other policies say of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_grpo.gaussian import Reduction, gaussian_kl, gaussian_log_prob
from diffusion_grpo.grpo import Estimator, kl_estimate
from diffusion_grpo.mesh import take_rows
from diffusion_grpo.rollout import Denoiser, Trajectory, denoising_step
from diffusion_grpo.schedule import Schedule, flow_step_sizes

KL = Literal["exact", "k1", "k2", "k3", "flow_grpo"]
# Those that read the summed log-ratio; the others compare the means of single steps.
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def latent_elements(latents: Float[Array, "..."]) -> int:
    """Return D, the elements of a latent, of a trajectory's latents `[T+1, B, h, w, c]`."""
    return math.prod(latents.shape[2:])


def averaged_elements(reduction: Reduction, latents: Float[Array, "..."]) -> int:
    """Return over how many elements a step's log-prob is a mean; 1 for a sum.

    Args:
        reduction: of the log-prob over the latent.
        latents: of a trajectory, `[T+1, B, h, w, c]`.
    """
    return latent_elements(latents) if reduction == "mean" else 1


class PolicySteps(NamedTuple):
    """What another policy says of the recorded steps; None where it is not needed.

    Attributes:
        means: μ of every step, `[T, B, h, w, c]`, 0 for steps that take no part.
        log_probs: log-prob of every recorded step, `[T, B]`, likewise.
    """

    means: Any = None
    log_probs: Any = None


class UpdateBatch(NamedTuple):
    """The trajectories of one iteration, B images.

    Attributes:
        trajectory: latents `[T+1, B, h, w, c]`, log-probs `[T, B]` under the policy that sampled
            them.
        conditioning: what the denoiser is conditioned on; leaves `[B, ...]` or `[1, ...]`.
        advantages: `[B]`.
        reference: the reference policy's steps, as far as the loss needs them.
        old: those of the policy that sampled.
    """

    trajectory: Trajectory
    conditioning: Any
    advantages: Any
    reference: PolicySteps = PolicySteps()
    old: PolicySteps = PolicySteps()

    def axes(self) -> UpdateBatch:
        """Return the axis of the images of every array; None where it has none."""
        count = self.trajectory.latents.shape[1]
        each = partial(jax.tree.map, lambda _: 1)
        return UpdateBatch(
            Trajectory(1, None, 1),
            jax.tree.map(lambda x: 0 if x.shape[0] == count else None, self.conditioning),
            0,
            each(self.reference),
            each(self.old),
        )

    def take(self, rows: Any) -> UpdateBatch:
        """Return the batch of some images, given as a slice or as their places."""
        latents, timesteps, log_probs = self.trajectory
        count = latents.shape[1]
        conditioning = jax.tree.map(
            lambda x: take_rows(x, rows) if x.shape[0] == count else x, self.conditioning
        )
        of_steps = partial(jax.tree.map, lambda x: take_rows(x, rows, 1))
        return UpdateBatch(
            Trajectory(of_steps(latents), timesteps, of_steps(log_probs)),
            conditioning,
            take_rows(self.advantages, rows),
            of_steps(self.reference),
            of_steps(self.old),
        )


def policy_steps(
    denoiser: Denoiser,
    schedule: Schedule,
    latents: Float[Array, "T1 B h w c"],
    conditioning: Any,
    active: Int[Array, " A"],
    *,
    reduction: Reduction,
    means: bool = True,
) -> PolicySteps:
    """Return what a policy says of the recorded steps that take part; once a rollout.

    Args:
        denoiser: the policy.
        schedule: of the rollout.
        latents: the recorded latents.
        conditioning: what the denoiser is conditioned on.
        active: the steps needed; the others' entries are 0.
        reduction: of the log-prob over the latent.
        means: keep the means; they are as large as the latents.
    """

    def step(kept: PolicySteps, i: Array) -> tuple[PolicySteps, None]:
        mean, std = denoising_step(denoiser, schedule, i, latents[i], conditioning)
        log_prob = gaussian_log_prob(latents[i + 1], mean, std, reduction=reduction)
        return PolicySteps(
            kept.means.at[i].set(mean) if means else None, kept.log_probs.at[i].set(log_prob)
        ), None

    empty = PolicySteps(
        jnp.zeros(latents[:-1].shape, jnp.float32) if means else None,
        jnp.zeros((latents.shape[0] - 1, latents.shape[1]), jnp.float32),
    )
    return jax.lax.scan(step, empty, active)[0]


def step_kl(
    mean: Float[Array, " B *latent"],
    std: Float[Array, ""],
    reference_mean: Float[Array, " B *latent"],
    schedule: Schedule,
    i: Int[Array, ""],
    *,
    kind: KL,
    reduction: Reduction,
    learned_noise: bool = False,
) -> Float[Array, " B"]:
    """Return the KL to the reference of one step, of the kinds that compare the two means.

    `exact`: the KL of the two Gaussians, summed over the steps of a trajectory. `flow_grpo`:
    mean‖μ_θ − μ_ref‖²/(2σ_t²) with σ_t² = σ²/dt the noise per unit of `flow_step_sizes` and no dt,
    σ the reference's; the mean over the latent whatever the reduction, averaged over the steps
    (Flow-GRPO, Liu et al. 2025, in their code). It is dt times the KL of the Gaussians.

    Args:
        mean: μ_θ.
        std: σ of the policy.
        reference_mean: μ_ref.
        schedule: with the reference's σ.
        i: the step.
        kind: `exact` or `flow_grpo`.
        reduction: of `exact` over the latent.
        learned_noise: the policy's σ is its own, and differs from the reference's.
    """
    if kind == "flow_grpo":
        # The reference's σ: by a learned one, more noise would be less of it.
        return flow_step_sizes(schedule)[i] * gaussian_kl(
            mean, reference_mean, schedule.std[i], reduction="mean"
        )
    std_q = schedule.std[i] if learned_noise else None
    return gaussian_kl(mean, reference_mean, std, reduction=reduction, std_q=std_q)


def trajectory_kl(
    denoiser: Denoiser,
    noisy: Schedule,
    reference: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    conditioning: Any,
    active: Int[Array, " A"],
    *,
    kind: KL,
    reduction: Reduction,
    learned_noise: bool = False,
) -> Float[Array, " B"]:
    """Return each image's KL to the reference, at the policy that sampled it.

    Args:
        denoiser: that policy.
        noisy: the schedule with its noise.
        reference: the reference policy.
        schedule: the schedule with the reference's noise.
        trajectory: as it was sampled.
        conditioning: what both are conditioned on.
        active: the steps that count.
        kind: as in the loss.
        reduction: of a step's log-prob and KL over the latent.
        learned_noise: see `step_kl`.

    Returns:
        float32 [B], no gradient.
    """
    latents = trajectory.latents

    def step(total: Array, i: Array) -> tuple[Array, None]:
        x_t = latents[i]
        mean_q, std_q = denoising_step(reference, schedule, i, x_t, conditioning)
        if kind in ESTIMATORS:
            log_q = gaussian_log_prob(latents[i + 1], mean_q, std_q, reduction=reduction)
            return total + trajectory.log_probs[i] - log_q, None
        mean, std = denoising_step(denoiser, noisy, i, x_t, conditioning)
        return total + step_kl(
            mean,
            std,
            mean_q,
            schedule,
            i,
            kind=kind,
            reduction=reduction,
            learned_noise=learned_noise,
        ), None

    total, _ = jax.lax.scan(step, jnp.zeros(latents.shape[1], jnp.float32), active)
    if kind in ESTIMATORS:
        return kl_estimate(total, kind, elements=averaged_elements(reduction, latents))
    return total / jnp.float32(active.shape[0]) if kind == "flow_grpo" else total
