"""One policy update over a batch of trajectories, at the cost of the steps that are differentiated.

Given the recorded latents, the T denoising steps are independent. So the gradient of a
trajectory-ratio loss is Σ_t w_t (∂L/∂log ρ) ∇ log π_θ(x_s|x_t) with one scalar ∂L/∂log ρ an image,
known once the sum over the steps is. One step of one microbatch is differentiated at a time: memory
holds no more, whatever T and the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
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


def _rows(batch: UpdateBatch, start: int, size: int) -> dict[str, Any]:
    """Take a microbatch: images `start` to `start + size`, and what all images share."""
    count = batch.trajectory.latents.shape[1]
    rows = slice(start, start + size)
    data = {
        "latents": batch.trajectory.latents[:, rows],
        "old": batch.trajectory.log_probs[:, rows],
        "advantages": batch.advantages[rows],
        "conditioning": jax.tree.map(
            lambda x: x[rows] if x.shape[0] == count else x, batch.conditioning
        ),
    }
    if batch.reference_means is not None:
        data["reference"] = batch.reference_means[:, rows]
    return data


def make_gradient(
    policy: Policy, config: LossConfig
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Compile the gradient of the GRPO loss, accumulated over microbatches and steps.

    One compiled program differentiates one step of one microbatch and adds to the sum, which is
    donated; a loop on the host calls it. So memory holds one step's activations whatever T and the
    batch, and one step is all that is compiled. (`lax.scan` around it would do the same in one
    program, but XLA's CPU backend runs the gradients of convolutions 10 times slower in a loop.)

    Args:
        policy: (trained, frozen parameters) → denoiser.
        config: see `LossConfig`.

    Returns:
        `gradient(params, frozen, schedule, batch, weights, active, steps, on_policy=…) -> (gradient
        like params, metrics)`, where `frozen` are the network's other parameters (passed, so that
        no weight is compiled in), `weights` `[T]` are w_t, `active` `[A]` the steps with noise and
        a weight above 0, `steps` `[K]` those of them to differentiate: their gradients are scaled
        by A/K, so that a uniform draw of K is an unbiased estimate. `on_policy` (static) says that
        θ sampled the batch, so that ρ = 1 and no forward sweep is needed.
    """

    def log_prob(
        params: Any, frozen: Any, schedule: Schedule, mb: Any, i: Array
    ) -> tuple[Array, Array, Array]:
        x_t, x_s = mb["latents"][i], mb["latents"][i + 1]
        denoiser = policy(params, frozen)
        mean, std = denoising_step(denoiser, schedule, i, x_t, mb["conditioning"])
        return gaussian_log_prob(x_s, mean, std, reduction=config.reduction), mean, std

    def surrogate(log_ratio: Array, mb: Any) -> tuple[Array, Array]:
        loss, clipped = clipped_surrogate(
            log_ratio, mb["advantages"], clip_low=config.clip_low, clip_high=config.clip_high
        )
        return loss.sum(), clipped

    @partial(jax.jit, static_argnames="on_policy")
    def trajectory_terms(
        params: Any,
        frozen: Any,
        schedule: Schedule,
        mb: Any,
        weights: Array,
        active: Array,
        *,
        on_policy: bool,
    ) -> tuple[Array, dict[str, Array]]:
        """∂L/∂log ρ of each image, and the ratio's metrics."""
        log_ratio = jnp.zeros_like(mb["advantages"])
        if not on_policy:

            def sweep(total: Array, i: Array) -> tuple[Array, None]:
                log_p, _, _ = log_prob(params, frozen, schedule, mb, i)
                return total + weights[i] * (log_p - mb["old"][i]), None

            log_ratio, _ = jax.lax.scan(sweep, log_ratio, active)
        (loss, clipped), pull = jax.value_and_grad(surrogate, has_aux=True)(log_ratio, mb)
        return pull, _ratio_metrics(log_ratio, clipped) | {"policy_loss": loss}

    @partial(jax.jit, donate_argnums=0)
    def accumulate(
        gradient: Any,
        params: Any,
        frozen: Any,
        schedule: Schedule,
        mb: Any,
        weights: Array,
        i: Array,
        pull: Array,
        share: Array,
        kl_share: Array,
    ) -> tuple[Any, dict[str, Array]]:
        """Add one step's gradient; the shares are what its terms count in the sum."""

        def step_loss(params: Any) -> tuple[Array, dict[str, Array]]:
            log_p, mean, std = log_prob(params, frozen, schedule, mb, i)
            metrics = {}
            if config.ratio == "trajectory":
                loss = share * weights[i] * (pull * log_p).sum()
            else:
                log_ratio = log_p - mb["old"][i]
                value, clipped = surrogate(log_ratio, mb)
                loss = share * value
                metrics = _ratio_metrics(log_ratio, clipped) | {"policy_loss": value}
                metrics = {k: v if k in EXTREMES else share * v for k, v in metrics.items()}
            if config.beta:
                kl = gaussian_kl(mean, mb["reference"][i], std, reduction=config.reduction)
                loss = loss + kl_share * config.beta * kl.sum()
                metrics = metrics | {"kl": kl_share * kl.sum()}
            return loss, metrics

        new, metrics = jax.grad(step_loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, gradient, new), metrics

    def gradient(
        params: Any,
        frozen: Any,
        schedule: Schedule,
        batch: UpdateBatch,
        weights: Array,
        active: Array,
        steps: Array,
        *,
        on_policy: bool,
    ) -> tuple[Any, dict[str, Array]]:
        count = batch.trajectory.latents.shape[1]
        number = steps.shape[0]
        # A trajectory's log-prob and the KL are sums over the A steps, estimated from K of them; a
        # per-step loss is a mean over the K, so that it does not grow with their number.
        kl_share = jnp.float32(active.shape[0] / number)
        share = kl_share if config.ratio == "trajectory" else jnp.float32(1 / number)
        total = jax.tree.map(jnp.zeros_like, params)
        history: list[dict[str, Array]] = []
        for start in range(0, count, config.microbatch):
            mb = _rows(batch, start, config.microbatch)
            pull = jnp.zeros_like(mb["advantages"])
            if config.ratio == "trajectory":
                pull, metrics = trajectory_terms(
                    params, frozen, schedule, mb, weights, active, on_policy=on_policy
                )
                history.append(metrics)
            for k in range(number):
                total, metrics = accumulate(
                    total, params, frozen, schedule, mb, weights, steps[k], pull, share, kl_share
                )
                history.append(metrics)
        return _divide(total, jnp.float32(count)), _reduce(history, count)

    return gradient


EXTREMES = ("ratio/min", "ratio/max")


@partial(jax.jit, donate_argnums=0)
def _divide(tree: Any, count: Array) -> Any:
    return jax.tree.map(lambda x: x / count, tree)


def _reduce(history: list[dict[str, Array]], count: int) -> dict[str, Array]:
    """Reduce metrics of microbatches and steps: extremes, and sums of the rest by image."""
    stacked: dict[str, list[Array]] = {}
    for metrics in history:
        for name, value in metrics.items():
            stacked.setdefault(name, []).append(value)
    reduced = {}
    for name, values in stacked.items():
        joined = jnp.stack(values)
        if name in EXTREMES:
            reduced[name] = joined.min() if name == "ratio/min" else joined.max()
        else:
            reduced[name] = joined.sum() / count
    return reduced


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
    gradient_of = make_gradient(policy, config)

    @partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, gradient: Any) -> tuple[TrainState, dict[str, Array]]:
        norm = optax.tree.norm(gradient)
        # Optax raises a float to an integer count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, changes), opt_state)
        finite = jnp.isfinite(norm)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return state, {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}

    def update(
        state: TrainState,
        frozen: Any,
        schedule: Schedule,
        batch: UpdateBatch,
        *steps: Array,
        on_policy: bool,
    ) -> tuple[TrainState, dict[str, Array]]:
        gradient, metrics = gradient_of(
            state.params, frozen, schedule, batch, *steps, on_policy=on_policy
        )
        state, applied = apply(state, gradient)
        penalty = metrics.get("kl", jnp.zeros((), jnp.float32))
        metrics["loss"] = metrics["policy_loss"] + config.beta * penalty
        return state, metrics | applied

    return update
