"""Samplers for inference: DDIM, DDPM, DPM-Solver++ (2M) and Euler as one linear recurrence.

All of them step from x_t with the network's output alone, and differ in numbers only::

    x_s = a x_t + b x̂₀ + c ε̂ + d x̂₀' + σ z,    z ~ N(0, I)

with x̂₀ and ε̂ read from the output at t, and x̂₀' that of the step before. Latents are those of the
variance-preserving process, x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε, for every sampler. The coefficients are
computed in float64; timesteps and noise levels are those of the Diffusers scheduler of the name. So
where the file names no `timestep_spacing`, `dpm++` and `euler` have linspace, the others leading;
and these two alone read `use_karras_sigmas`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from diffusion_grpo.errors import UsageError
from diffusion_grpo.rollout import Denoiser, step_noise
from diffusion_grpo.sampling import check_sampler
from diffusion_grpo.schedule import epsilon_x0, make_schedule
from diffusion_grpo.scheduler_config import (
    PredictionType,
    SchedulerConfig,
    alphas_cumprod,
    spaced_timesteps,
)

# The values of a checkpoint's fields that the two samplers are written for, the default first.
# Diffusers' schedulers of these names have others, which change what they draw. It takes the names
# of other classes' solvers for its own: "deis" for "dpmsolver++", "bh2" for "midpoint".
_SIGMA_CHOICES: dict[str, tuple[Any, ...]] = {
    "final_sigmas_type": ("zero",),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, True, None),
}
_SOLVER_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddpm": {"variance_type": ("fixed_small", "fixed_small_log", None)},
    "euler": _SIGMA_CHOICES | {"interpolation_type": ("linear",)},
    "dpm++": _SIGMA_CHOICES
    | {
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_order": (2,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
        "use_lu_lambdas": (False, None),
    },
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solver:
    """The coefficients of T steps, in the order they are taken; a JAX pytree.

    Leaves are float32 `[T]` but for `initial_scale`, a scalar.

    Args:
        timesteps: t of each step; Euler's may be fractional.
        signal_scale: √ᾱ_t.
        noise_scale: √(1−ᾱ_t).
        keep: a, the factor of x_t.
        to_x0: b, the factor of x̂₀.
        to_noise: c, the factor of ε̂.
        to_last: d, the factor of the step before's x̂₀; 0 at the first step.
        std: σ of the fresh noise.
        initial_scale: what N(0, I) is multiplied by at the start.
        prediction_type: what the network's output is (static).
        clip: x̂₀ is clipped to ± this; None for no clipping (static).
    """

    timesteps: Any
    signal_scale: Any
    noise_scale: Any
    keep: Any
    to_x0: Any
    to_noise: Any
    to_last: Any
    std: Any
    initial_scale: Any
    prediction_type: PredictionType = field(metadata={"static": True})
    clip: float | None = field(metadata={"static": True})

    @property
    def num_steps(self) -> int:
        """T."""
        return self.timesteps.shape[0]


def make_solver(
    config: SchedulerConfig, sampler: str, num_steps: int, *, eta: float = 0.0
) -> Solver:
    """Compute the coefficients of a sampler.

    - `ddim`: Song et al. 2021, eq. 12, with η.
    - `ddpm`: Ho et al. 2020, eq. 7, over the T timesteps visited; variance `fixed_small`, and no
      noise at the last step.
    - `dpm++`: DPM-Solver++ (2M), Lu et al. 2022, algorithm 2, midpoint, over x̂₀; its first and last
      steps are of first order.
    - `euler`: Karras et al. 2022, algorithm 2 without churn, in σ = √((1−ᾱ)/ᾱ).

    With the checkpoint's `use_karras_sigmas`, `dpm++` and `euler` visit the T noise levels of
    Karras et al. 2022, eq. 5, with ρ = 7::

        σ_i = (σ_max^(1/ρ) + i/(T−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ,    i = 0, …, T−1

    and the network is given the t at which the noise schedule has σ_i, interpolated in log σ;
    `dpm++` rounds it, or cuts its fraction off for a cosine schedule. σ_max and σ_min are those of
    all timesteps for `dpm++`, and of the timesteps that `timestep_spacing` visits for `euler`.

    Args:
        config: the checkpoint's noise schedule.
        sampler: one of `sampling.SAMPLERS`.
        num_steps: T.
        eta: η of `ddim`; the others take none.

    Returns:
        The coefficients.

    Raises:
        UsageError: no such sampler, an η for a sampler without one, T out of range, or a
            `solver_options` of the checkpoint with which Diffusers' scheduler of the name draws
            something else.
    """
    check_sampler(sampler, eta)
    _check_options(config, sampler)
    if sampler == "ddim":
        return _ddim(config, num_steps, eta)
    if sampler == "ddpm":
        return _ddpm(config, num_steps)
    return (_dpm if sampler == "dpm++" else _euler)(config, num_steps)


def solve(
    denoiser: Denoiser,
    solver: Solver,
    initial: Float[Array, " B *latent"],
    noise_keys: Key[Array, " B"],
    conditioning: Any,
    *,
    previews: bool = False,
) -> tuple[Float[Array, " B *latent"], Float[Array, " S B *latent"]]:
    """Draw B images.

    Args:
        denoiser: the guided network.
        solver: T steps.
        initial: standard normal noise; the solver scales it.
        noise_keys: [B]; step i of an image uses fold_in(key, i), as in training.
        conditioning: what the denoiser is conditioned on.
        previews: whether to keep x̂₀ of every step, for an animation.

    Returns:
        The clean latents, float32, and x̂₀ of every step, `[T, B, …]`, or `[0, B, …]` without
        previews.
    """

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        x, last = carry
        output = denoiser(x, solver.timesteps[i], conditioning)
        epsilon, x0 = epsilon_x0(
            solver.prediction_type,
            x,
            output,
            signal_scale=solver.signal_scale[i],
            noise_scale=solver.noise_scale[i],
        )
        if solver.clip is not None:
            x0 = jnp.clip(x0, -solver.clip, solver.clip)
        noise = step_noise(noise_keys, i, x.shape[1:])
        following = (
            solver.keep[i] * x
            + solver.to_x0[i] * x0
            + solver.to_noise[i] * epsilon
            + solver.to_last[i] * last
            + solver.std[i] * noise
        )
        return (following, x0), x0 if previews else x0[:0]

    start = solver.initial_scale * initial.astype(jnp.float32)
    (final, _), seen = jax.lax.scan(
        step, (start, jnp.zeros_like(start)), jnp.arange(solver.num_steps)
    )
    return final, seen if previews else seen.reshape(0, *start.shape)


def _solver(
    config: SchedulerConfig,
    timesteps: np.ndarray,
    signal: np.ndarray,
    noise: np.ndarray,
    *,
    clips: bool = False,
    initial_scale: float = 1.0,
    **coefficients: np.ndarray,
) -> Solver:
    zeros = np.zeros(len(timesteps))
    names = ("keep", "to_x0", "to_noise", "to_last", "std")
    arrays = {name: coefficients.get(name, zeros) for name in names}
    return Solver(
        timesteps=jnp.asarray(timesteps, jnp.float32),
        signal_scale=jnp.asarray(signal, jnp.float32),
        noise_scale=jnp.asarray(noise, jnp.float32),
        initial_scale=jnp.asarray(initial_scale, jnp.float32),
        prediction_type=config.prediction_type,
        clip=config.clip_sample_range if clips and config.clip_sample else None,
        **{name: jnp.asarray(values, jnp.float32) for name, values in arrays.items()},
    )


def _ddim(config: SchedulerConfig, num_steps: int, eta: float) -> Solver:
    schedule = make_schedule(config, num_steps, eta=eta)
    return _solver(
        config,
        np.asarray(schedule.timesteps),
        np.asarray(schedule.signal_scale),
        np.asarray(schedule.noise_scale),
        clips=True,
        to_x0=np.asarray(schedule.next_signal_scale),
        to_noise=np.asarray(schedule.direction_scale),
        std=np.asarray(schedule.std),
    )


def _ddpm(config: SchedulerConfig, num_steps: int) -> Solver:
    timesteps = spaced_timesteps(config, num_steps)
    table = alphas_cumprod(config)
    alpha_t = table[timesteps]
    alpha_s = np.append(alpha_t[1:], 1.0)  # the next timestep visited, and at last the picture
    if config.prediction_type == "epsilon" and np.any(alpha_t == 0):
        raise UsageError("the first timestep has zero signal, where epsilon says nothing of x₀")
    step_alpha = alpha_t / alpha_s
    to_x0 = np.sqrt(alpha_s) * (1 - step_alpha) / (1 - alpha_t)
    keep = np.sqrt(step_alpha) * (1 - alpha_s) / (1 - alpha_t)
    variance = (1 - alpha_s) / (1 - alpha_t) * (1 - step_alpha)
    return _solver(
        config,
        timesteps,
        np.sqrt(alpha_t),
        np.sqrt(1 - alpha_t),
        clips=True,
        keep=keep,
        to_x0=to_x0,
        std=np.sqrt(variance),
    )


def _sigmas(config: SchedulerConfig) -> np.ndarray:
    """Return √((1−ᾱ)/ᾱ) of every training timestep; zero signal is taken for ᾱ = 2⁻²⁴."""
    table = alphas_cumprod(config)
    table[table == 0] = 2.0**-24
    return np.sqrt((1 - table) / table)


def _karras(
    table: np.ndarray, highest: float, lowest: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return T noise levels from the highest to the lowest, and their timesteps in the table.

    Levels and timesteps are float64 `[T]`; see `make_solver` for the formula.
    """
    # Where a timestep is cut to an integer, the last bit of Diffusers' float32 table decides.
    table, rho = table.astype(np.float32), 7.0
    first, last = float(np.float32(highest)) ** (1 / rho), float(np.float32(lowest)) ** (1 / rho)
    sigma = (first + np.linspace(0, 1, count) * (last - first)) ** rho
    return sigma, np.interp(np.log(sigma), np.log(table), np.arange(len(table)))


def _dpm(config: SchedulerConfig, num_steps: int) -> Solver:
    count, table = num_steps, _sigmas(config)
    _check_count(count, config.num_train_timesteps)
    if config.use_karras_sigmas:
        sigma, timesteps = _karras(table, table[-1], table[0], count)
        # Diffusers rounds, but for the cosine schedule, where it cuts the fraction off.
        cosine = config.beta_schedule == "squaredcos_cap_v2"
        timesteps = np.trunc(timesteps) if cosine else timesteps.round()
    else:
        _check_clipping(config, table)
        timesteps = _dpm_timesteps(config, count)
        sigma = table[timesteps]
    alpha = 1 / np.sqrt(1 + sigma**2)
    noise = sigma * alpha
    lam = np.append(np.log(alpha) - np.log(noise), np.inf)  # the last step ends at σ = 0
    next_alpha, next_noise = np.append(alpha[1:], 1.0), np.append(noise[1:], 0.0)
    h = np.diff(lam)
    grow = -next_alpha * np.expm1(-h)  # α_t (1 − e^{−h})
    to_x0, to_last = grow.copy(), np.zeros(count)
    for i in range(1, count - 1):
        half_ratio = h[i] / (2 * h[i - 1])  # 1 / 2r₀, r₀ = h_{i−1} / h_i
        to_x0[i] += grow[i] * half_ratio
        to_last[i] = -grow[i] * half_ratio
    keep = next_noise / noise
    return _solver(config, timesteps, alpha, noise, keep=keep, to_x0=to_x0, to_last=to_last)


def _dpm_timesteps(config: SchedulerConfig, count: int) -> np.ndarray:
    total = config.num_train_timesteps
    if config.solver_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count + 1).round()[::-1][:-1]
    elif config.solver_spacing == "leading":
        ratio = total // (count + 1)
        timesteps = (np.arange(count + 1) * ratio)[::-1][:-1] + config.steps_offset
    else:
        timesteps = np.arange(total, 0, -total / count)[:count].round() - 1
    timesteps = timesteps.astype(np.int64)
    _check_last(timesteps, total, config)
    return timesteps


def _euler(config: SchedulerConfig, num_steps: int) -> Solver:
    total, count = config.num_train_timesteps, num_steps
    _check_count(count, total)
    if config.solver_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count, dtype=np.float32)[::-1].astype(np.float64)
    else:
        timesteps = spaced_timesteps(config, count).astype(np.float64)
    _check_last(timesteps, total, config)
    table = _sigmas(config)
    sigma = np.interp(timesteps, np.arange(total), table)
    if config.use_karras_sigmas:
        lowest = sigma[-1]
        if config.solver_spacing == "trailing" and len(np.arange(total, 0, -total / count)) > count:
            lowest = table[0]  # that of the entry too many that `spaced_timesteps` cuts off
        sigma, timesteps = _karras(table, sigma[0], lowest, count)
    following = np.append(sigma[1:], 0.0)
    alpha, next_alpha = 1 / np.sqrt(1 + sigma**2), 1 / np.sqrt(1 + following**2)
    # Diffusers starts at σ_max ε for these spacings and at √(σ_max² + 1) ε otherwise.
    spread = config.solver_spacing in ("linspace", "trailing")
    return _solver(
        config,
        timesteps,
        alpha,
        sigma * alpha,
        keep=next_alpha / alpha,
        to_noise=next_alpha * (following - sigma),
        initial_scale=float(sigma[0] * alpha[0]) if spread else 1.0,
    )


def _check_options(config: SchedulerConfig, sampler: str) -> None:
    for name, choices in _SOLVER_CHOICES.get(sampler, {}).items():
        value = config.solver_options.get(name, choices[0])
        if name == "use_lu_lambdas" and config.use_karras_sigmas:
            continue  # Karras' levels go before these
        # `type` too, because 1 == True and JSON tells them apart.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            _refuse_option(name, value, sampler, " or ".join(map(repr, choices)))


def _check_clipping(config: SchedulerConfig, table: np.ndarray) -> None:
    """Refuse a least λ = log(√ᾱ/√(1−ᾱ)) that leaves out the noisiest timesteps."""
    bound, least = config.solver_options.get("lambda_min_clipped", -np.inf), -np.log(table[-1])
    if type(bound) not in (int, float) or not bound <= least:
        _refuse_option("lambda_min_clipped", bound, "dpm++", f"at most {least:.4g}")


def _refuse_option(name: str, value: Any, sampler: str, expected: str) -> NoReturn:
    raise UsageError(
        f"the checkpoint's scheduler_config.json has {name} = {value!r}, which the sampler "
        f"{sampler} does not support: Diffusers' would draw something else. Expected {expected}; "
        "change it there, or take the sampler ddim, which does not read it"
    )


def _check_count(count: int, total: int) -> None:
    if not 1 <= count < total:
        raise UsageError(f"num_steps is {count}; expected 1 to {total - 1}")


def _check_last(timesteps: np.ndarray, total: int, config: SchedulerConfig) -> None:
    if timesteps[0] >= total:
        raise UsageError(
            f"with {len(timesteps)} steps and steps_offset = {config.steps_offset} the first "
            f"timestep is {timesteps[0]:g}, past the last of {total}: use fewer steps"
        )
