"""Noise schedules, and the denoising step as a Gaussian.

A `SchedulerConfig` is what a checkpoint's `scheduler_config.json` says. `make_schedule` turns it
into a `Schedule`: the constants of T denoising steps, computed once in float64 and kept in float32.
`step_distribution` is the one place where a model's output becomes the mean and standard deviation
of the next latent; the sampler, the recomputation of log-probs and the losses all call it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_grpo.errors import UsageError
from diffusion_grpo.gaussian import Reduction, gaussian_kl, gaussian_log_prob
from diffusion_grpo.scheduler_config import (
    BetaSchedule,
    PredictionType,
    SchedulerConfig,
    TimestepSpacing,
    alphas_cumprod,
    spaced_timesteps,
)

__all__ = [
    "BetaSchedule",
    "PredictionType",
    "Reduction",
    "Schedule",
    "SchedulerConfig",
    "TimestepSpacing",
    "add_noise",
    "alphas_cumprod",
    "epsilon_x0",
    "flow_step_sizes",
    "gaussian_kl",
    "gaussian_log_prob",
    "make_schedule",
    "predict_epsilon_x0",
    "scaled_noise",
    "spaced_timesteps",
    "step_distribution",
    "step_sensitivity",
    "velocity",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """The constants of T denoising steps, in the order they are taken; a JAX pytree.

    Leaves are `[T]`, float32 except `timesteps` (int32). They are annotated `Any` because a pytree
    of shardings, shapes or tracers has the same structure.

    Args:
        timesteps: t of each step.
        signal_scale: √ᾱ_t.
        noise_scale: √(1−ᾱ_t).
        next_signal_scale: √ᾱ_s, s the timestep that the step leads to.
        direction_scale: √(1−ᾱ_s−σ_t²), the factor of ε̂ in the mean.
        std: σ_t; 0 marks a deterministic step.
        output_gain: ∂μ/∂output, without clipping of x̂₀ (kept because float32 cancels in it).
        prediction_type: what the model's output is (static).
        clip_sample: clip x̂₀ (static).
        clip_sample_range: its limit (static).
    """

    timesteps: Any
    signal_scale: Any
    noise_scale: Any
    next_signal_scale: Any
    direction_scale: Any
    std: Any
    output_gain: Any
    prediction_type: PredictionType = field(metadata={"static": True})
    clip_sample: bool = field(metadata={"static": True})
    clip_sample_range: float = field(metadata={"static": True})

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return self.timesteps.shape[0]

    @property
    def stochastic(self) -> Any:
        """Bool [T]: the steps that have a density (σ_t > 0)."""
        return self.std > 0


def make_schedule(
    config: SchedulerConfig,
    num_steps: int,
    *,
    eta: float,
    stochastic_steps: Sequence[bool] | None = None,
) -> Schedule:
    """Compute the constants of `num_steps` DDIM-η steps (Song et al. 2021, eq. 12 and 16).

    σ_t = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s), with s = t − ⌊num_train_timesteps / T⌋ as in Diffusers;
    where s < 0, ᾱ_s is 1 or ᾱ₀ (`set_alpha_to_one`).

    Args:
        config: the noise schedule.
        num_steps: T.
        eta: η ≥ 0; 0 is deterministic DDIM, 1 ancestral DDPM sampling.
        stochastic_steps: [T]; steps marked false are made deterministic (σ = 0), for a window of
            noise. A step whose σ is 0 anyway stays so.

    Returns:
        The schedule.

    Raises:
        UsageError: T or η out of range, a mask of another length, ε-prediction at ᾱ = 0.
    """
    timesteps = spaced_timesteps(config, num_steps)
    if not (math.isfinite(eta) and eta >= 0):
        raise UsageError(f"eta is {eta}; expected 0 (deterministic) or more, usually at most 1.")
    mask = np.ones(num_steps, bool) if stochastic_steps is None else np.asarray(stochastic_steps)
    if mask.shape != (num_steps,):
        raise UsageError(
            f"stochastic_steps has {mask.size} entries; expected one a step, {num_steps}."
        )

    table = alphas_cumprod(config)
    final = 1.0 if config.set_alpha_to_one else table[0]
    previous = timesteps - config.num_train_timesteps // num_steps
    alpha_t = table[timesteps]
    alpha_s = np.where(previous >= 0, table[np.maximum(previous, 0)], final)
    if config.prediction_type == "epsilon" and np.any(alpha_t == 0):
        raise UsageError(
            "The first timestep has zero signal (ᾱ = 0) and the model predicts epsilon, which says "
            "nothing of x₀ there. Set rescale_betas_zero_snr to false, or timestep_spacing to "
            "'leading'."
        )
    if np.any(alpha_t == 1):
        raise UsageError(
            "A timestep has no noise at all (ᾱ = 1 in float32); its β is too small to sample with."
        )

    unit_variance = (1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s)  # at η = 1
    variance = np.where(mask, eta**2 * unit_variance, 0.0)
    remainder = 1 - alpha_s - variance
    # At η = 1 and ᾱ_t = 0 the remainder is 0, and rounding may leave it a little below.
    if np.any(remainder < -1e-9):
        limit = np.sqrt(np.min((1 - alpha_s)[variance > 0] / unit_variance[variance > 0]))
        raise UsageError(
            f"eta is {eta}, which asks for more noise than a step holds; with {num_steps} steps of "
            f"this schedule it may be at most {limit:.4g}."
        )
    direction = np.sqrt(np.maximum(remainder, 0.0))
    gain = _output_gain(config.prediction_type, alpha_t, alpha_s, direction)

    def constant(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values, jnp.float32)

    return Schedule(
        timesteps=jnp.asarray(timesteps, jnp.int32),
        signal_scale=constant(np.sqrt(alpha_t)),
        noise_scale=constant(np.sqrt(1 - alpha_t)),
        next_signal_scale=constant(np.sqrt(alpha_s)),
        direction_scale=constant(direction),
        std=constant(np.sqrt(variance)),
        output_gain=constant(gain),
        prediction_type=config.prediction_type,
        clip_sample=config.clip_sample,
        clip_sample_range=config.clip_sample_range,
    )


def _output_gain(
    prediction_type: PredictionType,
    alpha_t: np.ndarray,
    alpha_s: np.ndarray,
    direction: np.ndarray,
) -> np.ndarray:
    """Return ∂μ/∂output of each step in float64: √ᾱ_s ∂x̂₀/∂output + direction ∂ε̂/∂output."""
    signal, noise, next_signal = np.sqrt(alpha_t), np.sqrt(1 - alpha_t), np.sqrt(alpha_s)
    if prediction_type == "epsilon":
        return direction - next_signal * noise / signal
    if prediction_type == "v_prediction":
        return direction * signal - next_signal * noise
    return next_signal - direction * signal / noise


def _per_image(values: Array, ndim: int) -> Array:
    """Shape a scalar, or one value an image `[B]`, so that it multiplies a `[B, ...]` array."""
    return values if values.ndim == 0 else values.reshape(values.shape + (1,) * (ndim - 1))


def epsilon_x0(
    prediction_type: PredictionType,
    sample: Float[Array, " B *latent"],
    model_output: Float[Array, " B *latent"],
    *,
    signal_scale: Float[Array, ""] | Float[Array, " B"],
    noise_scale: Float[Array, ""] | Float[Array, " B"],
) -> tuple[Float[Array, " B *latent"], Float[Array, " B *latent"]]:
    """Read noise and clean latent from a model's output, as in Diffusers, without clipping.

    ε-prediction: x̂₀ = (x_t − √(1−ᾱ) ε̂)/√ᾱ. v: x̂₀ = √ᾱ x_t − √(1−ᾱ) v, ε̂ = √ᾱ v + √(1−ᾱ) x_t
    (Salimans & Ho 2022). sample: ε̂ = (x_t − √ᾱ x̂₀)/√(1−ᾱ).

    Args:
        prediction_type: what the output is.
        sample: x_t.
        model_output: the output, after guidance.
        signal_scale: √ᾱ_t, a scalar or one an image.
        noise_scale: √(1−ᾱ_t), likewise.

    Returns:
        (ε̂, x̂₀), float32.
    """
    x, output = sample.astype(jnp.float32), model_output.astype(jnp.float32)
    signal, noise = _per_image(signal_scale, x.ndim), _per_image(noise_scale, x.ndim)
    if prediction_type == "epsilon":
        return output, (x - noise * output) / signal
    if prediction_type == "v_prediction":
        return signal * output + noise * x, signal * x - noise * output
    return (x - signal * output) / noise, output


def predict_epsilon_x0(
    schedule: Schedule,
    i: Int[Array, " ..."] | int,
    sample: Float[Array, " B *latent"],
    model_output: Float[Array, " B *latent"],
) -> tuple[Float[Array, " B *latent"], Float[Array, " B *latent"]]:
    """Return (ε̂, x̂₀) at step i; x̂₀ is clipped if the schedule says so, ε̂ is that before clipping.

    Args:
        schedule: T steps.
        i: the step's index, a scalar or one an image `[B]`.
        sample: x_t, any float dtype.
        model_output: the model's output at x_t, after guidance.

    Returns:
        (ε̂, x̂₀), float32.
    """
    epsilon, x0 = epsilon_x0(
        schedule.prediction_type,
        sample,
        model_output,
        signal_scale=schedule.signal_scale[i],
        noise_scale=schedule.noise_scale[i],
    )
    if schedule.clip_sample:
        x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
    return epsilon, x0


def step_distribution(
    schedule: Schedule,
    i: Int[Array, " ..."] | int,
    sample: Float[Array, " B *latent"],
    model_output: Float[Array, " B *latent"],
) -> tuple[Float[Array, " B *latent"], Float[Array, " ..."]]:
    """Return mean and standard deviation of the next latent (Song et al. 2021, eq. 12).

    μ = √ᾱ_s x̂₀ + √(1−ᾱ_s−σ_t²) ε̂; x_s ~ N(μ, σ_t² I).

    Args:
        schedule: T steps.
        i: the step's index, a scalar or one an image `[B]`.
        sample: x_t, any float dtype.
        model_output: the model's output at x_t, after guidance.

    Returns:
        μ, float32, shaped like `sample`, and σ_t, float32, shaped like `i`.
    """
    epsilon, x0 = predict_epsilon_x0(schedule, i, sample, model_output)
    next_signal = _per_image(schedule.next_signal_scale[i], epsilon.ndim)
    direction = _per_image(schedule.direction_scale[i], epsilon.ndim)
    return next_signal * x0 + direction * epsilon, schedule.std[i]


def step_sensitivity(schedule: Schedule) -> Float[Array, " T"]:
    """Return |∂μ/∂output| / σ of each step: how far a unit change of the output moves the density.

    With k_t = √(1−ᾱ_s−σ_t²) the numerator is |k_t − √ᾱ_s √(1−ᾱ_t)/√ᾱ_t| for ε-prediction,
    |k_t √ᾱ_t − √ᾱ_s √(1−ᾱ_t)| for v and |√ᾱ_s − k_t √ᾱ_t/√(1−ᾱ_t)| for x₀; clipping of x̂₀ is
    ignored.

    Args:
        schedule: T steps.

    Returns:
        float32 [T], in standard deviations; 0 for a deterministic step, which has no density.
    """
    stochastic = schedule.stochastic
    safe = jnp.where(stochastic, schedule.std, 1.0)
    return jnp.where(stochastic, jnp.abs(schedule.output_gain) / safe, 0.0)


def flow_step_sizes(schedule: Schedule) -> Float[Array, " T"]:
    """Return dt of each step in the time of flow matching, τ = √(1−ᾱ)/(√ᾱ + √(1−ᾱ)).

    x_t/(√ᾱ + √(1−ᾱ)) = (1−τ) x₀ + τ ε is a point of the straight path that flow models follow, so
    τ_t − τ_s is what Flow-GRPO calls dt.

    Args:
        schedule: T steps.

    Returns:
        float32 [T], 0 or more; where each step leads to the next timestep (as with `leading`
        spacing) they sum to τ of the first timestep less that of the end.
    """
    next_noise = jnp.sqrt(jnp.maximum(1 - jnp.square(schedule.next_signal_scale), 0.0))
    now = schedule.noise_scale / (schedule.signal_scale + schedule.noise_scale)
    return now - next_noise / (schedule.next_signal_scale + next_noise)


def scaled_noise(schedule: Schedule, log_scale: Float[Array, " T"]) -> Schedule:
    """Return the schedule with σ_t exp(s_t) in place of σ_t; the means stay as they are.

    Args:
        schedule: T steps.
        log_scale: s_t; without effect on a deterministic step.
    """
    return replace(schedule, std=schedule.std * jnp.exp(log_scale))


def _forward_scales(table: Any, timesteps: Array, ndim: int) -> tuple[Array, Array]:
    """Look up (√ᾱ_t, √(1−ᾱ_t)), the roots taken in float64 if the table is NumPy's."""
    xp = np if isinstance(table, np.ndarray) else jnp
    signal = jnp.asarray(xp.sqrt(table), jnp.float32)[timesteps]
    noise = jnp.asarray(xp.sqrt(1 - table), jnp.float32)[timesteps]
    return _per_image(signal, ndim), _per_image(noise, ndim)


def add_noise(
    alphas_cumprod: Any,
    x0: Float[Array, " B *latent"],
    noise: Float[Array, " B *latent"],
    timesteps: Int[Array, ""] | Int[Array, " B"],
) -> Float[Array, " B *latent"]:
    """Return x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε, a draw of the forward process (Ho et al. 2020, eq. 4).

    Args:
        alphas_cumprod: the table of ᾱ, `alphas_cumprod(config)` or a JAX array of it.
        x0: clean latents.
        noise: ε, standard normal.
        timesteps: t, a scalar or one an image.

    Returns:
        x_t, float32.
    """
    signal, scale = _forward_scales(alphas_cumprod, timesteps, x0.ndim)
    return signal * x0.astype(jnp.float32) + scale * noise.astype(jnp.float32)


def velocity(
    alphas_cumprod: Any,
    x0: Float[Array, " B *latent"],
    noise: Float[Array, " B *latent"],
    timesteps: Int[Array, ""] | Int[Array, " B"],
) -> Float[Array, " B *latent"]:
    """Return v = √ᾱ_t ε − √(1−ᾱ_t) x₀, the target of v-prediction (Salimans & Ho 2022).

    Args:
        alphas_cumprod: the table of ᾱ, `alphas_cumprod(config)` or a JAX array of it.
        x0: clean latents.
        noise: ε that x_t was made with.
        timesteps: t, a scalar or one an image.

    Returns:
        v, float32.
    """
    signal, scale = _forward_scales(alphas_cumprod, timesteps, x0.ndim)
    return signal * noise.astype(jnp.float32) - scale * x0.astype(jnp.float32)
