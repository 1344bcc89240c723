"""One policy update over a batch of trajectories, at the cost of the steps that are differentiated.

Given the recorded latents, the T denoising steps are independent. So the gradient of a
trajectory-ratio loss is Σ_t w_t (∂L/∂log ρ) ∇ log π_θ(x_s|x_t) with one scalar ∂L/∂log ρ an image,
known once the sum over the steps is. Steps and microbatches are scanned: memory holds one step of
one microbatch, whatever T and the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffusion_grpo.gaussian import gaussian_kl, gaussian_log_prob
from diffusion_grpo.grpo import clipped_surrogate, kl_estimate
from diffusion_grpo.rollout import Denoiser, Trajectory, denoising_step
from diffusion_grpo.schedule import Schedule

# (trained parameters, frozen parameters) → the policy's denoiser
Policy = Callable[[Any, Any], Denoiser]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What the update computes; every field is static in the compiled program.

    Attributes:
        ratio: one ratio an image, of the summed log-probs, or one a step.
        clip_low: ε_low of `clipped_surrogate`.
        clip_high: ε_high.
        reduction: of a step's log-prob (and KL) over the latent.
        beta: weight of the KL to the reference; 0 leaves it out.
        microbatch: images differentiated at a time.
    """

    ratio: Literal["trajectory", "step"] = "trajectory"
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    reduction: Literal["mean", "sum"] = "mean"
    beta: float = 0.0
    microbatch: int = 8


class UpdateBatch(NamedTuple):
    """The trajectories of one iteration, B images.

    Attributes:
        trajectory: latents `[T+1, B, h, w, c]`, log-probs `[T, B]` under the policy that sampled
            them.
        conditioning: what the denoiser is conditioned on; leaves `[B, ...]` or `[1, ...]`.
        advantages: `[B]`.
        reference_means: μ_ref of every step, `[T, B, h, w, c]`, or None where β = 0.
    """

    trajectory: Trajectory
    conditioning: Any
    advantages: Any
    reference_means: Any = None


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        params: the trained parameters, float32.
        opt_state: the optimizer's.
    """

    params: Any
    opt_state: Any


def reference_means(
    denoiser: Denoiser,
    schedule: Schedule,
    latents: Float[Array, "T1 B h w c"],
    conditioning: Any,
    active: Int[Array, " A"],
) -> Float[Array, "T B h w c"]:
    """Return the reference policy's μ of the recorded steps that have a gradient, once a rollout.

    Args:
        denoiser: the reference policy.
        schedule: of the rollout.
        latents: the recorded latents.
        conditioning: what the denoiser is conditioned on.
        active: the steps needed; the others' entries are 0.
    """

    def step(means: Array, i: Array) -> tuple[Array, None]:
        mean = denoising_step(denoiser, schedule, i, latents[i], conditioning)[0]
        return means.at[i].set(mean), None

    empty = jnp.zeros(latents[:-1].shape, jnp.float32)
    return jax.lax.scan(step, empty, active)[0]


def _split(tree: Any, batch: int, size: int, axis: int) -> Any:
    """Lay the batch axis out as microbatches in front: `[.., B, ..]` → `[B/size, .., size, ..]`."""

    def split(x: Array) -> Array:
        if x.shape[axis] != batch:  # one entry for all images
            return jnp.broadcast_to(x[None], (batch // size, *x.shape))
        shape = (*x.shape[:axis], batch // size, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    return jax.tree.map(split, tree)


def loss_gradient(
    policy: Policy,
    config: LossConfig,
    params: Any,
    frozen: Any,
    schedule: Schedule,
    batch: UpdateBatch,
    weights: Float[Array, " T"],
    active: Int[Array, " A"],
    steps: Int[Array, " K"],
    *,
    on_policy: bool,
) -> tuple[Any, dict[str, Array]]:
    """Return the gradient of the GRPO loss, accumulated over microbatches and steps, and metrics.

    Args:
        policy: (trained, frozen parameters) → denoiser.
        config: see `LossConfig`.
        params: the trained parameters θ.
        frozen: the rest of the network's; passed, not closed over, so that no weight is compiled
            in.
        schedule: of the rollout.
        batch: the rollout.
        weights: w_t of the trajectory log-prob; 0 leaves a step out.
        active: the steps in play: those with noise and a weight above 0.
        steps: those of them to differentiate. Their gradients are scaled by A/K, so that a uniform
            draw of K is an unbiased estimate.
        on_policy: whether θ are the parameters that sampled the batch, so that ρ = 1 and no forward
            sweep is needed (static).

    Returns:
        Gradient, like `params`; metrics, scalars.
    """
    latents = batch.trajectory.latents
    count = latents.shape[1]
    scale = active.shape[0] / steps.shape[0]
    size = config.microbatch
    data = {
        "latents": _split(latents, count, size, 1),
        "old": _split(batch.trajectory.log_probs, count, size, 1),
        "conditioning": _split(batch.conditioning, count, size, 0),
        "advantages": _split(batch.advantages, count, size, 0),
    }
    if config.beta:
        data["reference"] = _split(batch.reference_means, count, size, 1)

    def log_prob(params: Any, mb: Any, i: Array) -> tuple[Array, Array, Array]:
        x_t, x_s = mb["latents"][i], mb["latents"][i + 1]
        mean, std = denoising_step(policy(params, frozen), schedule, i, x_t, mb["conditioning"])
        return gaussian_log_prob(x_s, mean, std, reduction=config.reduction), mean, std

    def surrogate(log_ratio: Array, mb: Any) -> tuple[Array, Array]:
        loss, clipped = clipped_surrogate(
            log_ratio, mb["advantages"], clip_low=config.clip_low, clip_high=config.clip_high
        )
        return loss.sum() / count, clipped

    def trajectory_terms(mb: Any) -> tuple[Array, dict[str, Array]]:
        """∂L/∂log ρ of each image, and the ratio's metrics."""
        if on_policy:
            log_ratio = jnp.zeros_like(mb["advantages"])
        else:

            def sweep(total: Array, i: Array) -> tuple[Array, None]:
                return total + weights[i] * (log_prob(params, mb, i)[0] - mb["old"][i]), None

            log_ratio, _ = jax.lax.scan(sweep, jnp.zeros_like(mb["advantages"]), active)
        (loss, clipped), pull = jax.value_and_grad(surrogate, has_aux=True)(log_ratio, mb)
        return pull, _ratio_metrics(log_ratio, clipped) | {"policy_loss": loss * count}

    def step_loss(params: Any, mb: Any, i: Array, pull: Array) -> tuple[Array, dict[str, Array]]:
        log_p, mean, std = log_prob(params, mb, i)
        if config.ratio == "trajectory":
            loss, metrics = scale * weights[i] * (pull * log_p).sum(), {}
        else:
            # A mean over the steps, so that the loss does not grow with their number.
            log_ratio = log_p - mb["old"][i]
            value, clipped = surrogate(log_ratio, mb)
            loss = value / steps.shape[0]
            metrics = _ratio_metrics(log_ratio, clipped) | {"policy_loss": value * count}
            metrics = {k: v if k in EXTREMES else v / steps.shape[0] for k, v in metrics.items()}
        if config.beta:
            kl = gaussian_kl(mean, mb["reference"][i], std, reduction=config.reduction)
            loss = loss + scale * config.beta * kl.sum() / count
            metrics = metrics | {"kl": scale * kl.sum()}
        return loss, metrics

    def microbatch(gradient: Any, mb: Any) -> tuple[Any, dict[str, Array]]:
        if config.ratio == "trajectory":
            pull, metrics = trajectory_terms(mb)
        else:
            pull, metrics = jnp.zeros_like(mb["advantages"]), {}

        def step(gradient: Any, i: Array) -> tuple[Any, dict[str, Array]]:
            new, values = jax.grad(step_loss, has_aux=True)(params, mb, i, pull)
            return jax.tree.map(jnp.add, gradient, new), values

        gradient, values = jax.lax.scan(step, gradient, steps)
        return gradient, metrics | _reduce(values)

    zero = jax.tree.map(jnp.zeros_like, params)
    gradient, values = jax.lax.scan(microbatch, zero, data)
    values = _reduce(values)
    return gradient, {k: v if k in EXTREMES else v / count for k, v in values.items()}


EXTREMES = {"ratio/min": jnp.min, "ratio/max": jnp.max}


def _reduce(values: dict[str, Array]) -> dict[str, Array]:
    """Reduce scanned metrics over their leading axis: extremes, and sums of the rest."""
    return {name: EXTREMES.get(name, jnp.sum)(value, axis=0) for name, value in values.items()}


def _ratio_metrics(log_ratio: Array, clipped: Array) -> dict[str, Array]:
    """Sums over the images (extremes for min and max)."""
    ratio = jnp.exp(log_ratio)
    return {
        "ratio/mean": ratio.sum(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "clip_fraction": clipped.sum().astype(jnp.float32),
        # k3 with the roles of Schulman 2020: samples are the old policy's, so
        # δ = log π_old − log π_θ
        "approx_kl": kl_estimate(-log_ratio, "k3").sum(),
    }


def make_update(
    policy: Policy, config: LossConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compile the update.

    Returns:
        `update(state, frozen, schedule, batch, weights, active, steps, on_policy=…) -> (state,
        metrics)`; the state is donated. Metrics: `loss`, `policy_loss`, `ratio/mean|min|max`,
        `clip_fraction`, `approx_kl`, `kl` (where β > 0), `grad_norm` (before clipping). A gradient
        that is not finite leaves the state as it was, and `skipped` is 1.
    """

    def update(
        state: TrainState,
        frozen: Any,
        schedule: Schedule,
        batch: UpdateBatch,
        weights: Array,
        active: Array,
        steps: Array,
        *,
        on_policy: bool,
    ) -> tuple[TrainState, dict[str, Array]]:
        gradient, metrics = loss_gradient(
            policy,
            config,
            state.params,
            frozen,
            schedule,
            batch,
            weights,
            active,
            steps,
            on_policy=on_policy,
        )
        norm = optax.tree.norm(gradient)
        # Optax raises a float to an integer count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, changes), opt_state)
        finite = jnp.isfinite(norm)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        kl = metrics.get("kl", jnp.zeros((), jnp.float32))
        metrics["loss"] = metrics["policy_loss"] + config.beta * kl
        return state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}

    return jax.jit(update, static_argnames="on_policy", donate_argnums=0)
