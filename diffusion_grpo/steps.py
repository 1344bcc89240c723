"""Which denoising steps have noise, which are learned from, with which weight and clip range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from diffusion_grpo.advantages import discounts
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gaussian import Reduction
from diffusion_grpo.grpo import scaled_clip
from diffusion_grpo.schedule import Schedule, step_sensitivity

StepWeights = Literal["uniform", "gain", "given"]
Ratio = Literal["trajectory", "step"]

# The latents that clip ranges are given for: 64 × 64 × 4, of an image of 512 × 512 pixels.
NOMINAL_LATENT = 64 * 64 * 4


class StepPlan(NamedTuple):
    """What an iteration's update does with each of the T steps; arrays, so none is compiled in.

    Attributes:
        weights: w_t, float32 `[T]`.
        active: int32 `[A]`, the steps with noise and a weight above 0 that take part, in order.
        steps: int32 `[K]`, those of them that are differentiated.
        discounts: γ^(steps remaining), float32 `[T]`.
        clip_low: ε_low as it acts, after scaling; float32 scalar.
        clip_high: ε_high.
        dual_clip: c of the dual clip, or None without it.
    """

    weights: Any
    active: Any
    steps: Any
    discounts: Any
    clip_low: Any
    clip_high: Any
    dual_clip: Any = None


def step_weights(
    schedule: Schedule, kind: StepWeights, given: Sequence[float] = ()
) -> Float[Array, " T"]:
    """Return w_t of the trajectory log-prob Σ_t w_t log p_t.

    `uniform`: 1 on the stochastic steps, the density itself. `gain`: 1/(s_t/mean(s)), s_t the
    `step_sensitivity`, on the stochastic steps but the last, the mean taken over those same steps.
    Without it the ratio of an η = 1 trajectory is one of the last steps' pixels only. `given`: the
    numbers given, on the stochastic steps.

    Args:
        schedule: T steps.
        kind: which weights.
        given: [T], each ≥ 0, for `given`.

    Returns:
        float32 [T]; 0 for the steps that take no part.

    Raises:
        UsageError: no step is left: `gain` where fewer than two are stochastic, or `given` weights
            of another number, or 0 on all that are.
    """
    stochastic = schedule.stochastic
    if kind == "uniform":
        return stochastic.astype(jnp.float32)
    if kind == "given":
        if len(given) != schedule.num_steps:
            raise UsageError(
                f"{len(given)} step weights are given for {schedule.num_steps} denoising steps; "
                "expected one a step"
            )
        weights = jnp.where(stochastic, jnp.asarray(given, jnp.float32), 0.0)
        if not isinstance(weights, Tracer) and not (weights > 0).any():
            raise UsageError(
                f"step weights {tuple(given)} are 0 on every step with noise; expected a number "
                "above 0 on one of them at least"
            )
        return weights
    if not isinstance(stochastic, Tracer) and int(stochastic.sum()) < 2:
        raise UsageError(
            f"step_weights 'gain' drops the last stochastic step, and this schedule has only "
            f"{int(stochastic.sum())}. Use 'uniform' or make more steps stochastic."
        )
    later = jnp.cumsum(stochastic[::-1].astype(jnp.int32))[::-1]  # stochastic steps from t on
    used = stochastic & (later > 1)
    sensitivity = step_sensitivity(schedule)
    count = jnp.maximum(used.sum(), 1).astype(jnp.float32)
    mean = jnp.where(used, sensitivity, 0.0).sum() / count
    return jnp.where(used, mean / jnp.where(used, sensitivity, 1.0), 0.0)


def noise_window(
    schedule: Schedule, size: int, *, start: int = 0, every: int = 0, iteration: int = 0
) -> list[bool]:
    """Return which steps of a window have noise; the others become deterministic.

    The window is `size` consecutive steps of those that have noise at all, so it is never empty. A
    moving one visits each of its positions in turn, and so each of those steps. All images of an
    iteration share it: else the difference of noise would be in a group's rewards. Source: MixGRPO
    (Li et al. 2025); Flow-GRPO-Fast.

    Args:
        schedule: T steps, all with the noise that η asks for.
        size: of the window.
        start: its first step, at iteration 0.
        every: iterations after which it moves on by one step, around the end; 0 never.
        iteration: of the run.

    Returns:
        [T], true for the steps within.

    Raises:
        UsageError: the window reaches beyond the steps that have noise.
    """
    noisy = np.flatnonzero(np.asarray(schedule.stochastic))
    if start + size > len(noisy):
        raise UsageError(
            f"a window of {size} steps from step {start} on, but only {len(noisy)} of the "
            f"{schedule.num_steps} steps have noise (the last has none where the checkpoint's "
            f"scheduler sets alpha to one); expected a window within the first {len(noisy)}"
        )
    positions = len(noisy) - size + 1
    first = (start + (iteration // every if every else 0)) % positions
    inside = set(noisy[first : first + size].tolist())
    return [i in inside for i in range(schedule.num_steps)]


def active_steps(schedule: Schedule, weights: Float[Array, " T"]) -> Int[Array, " A"]:
    """Return the steps that have a gradient: with noise, and a weight above 0; `[A]` in order."""
    active = np.asarray(schedule.stochastic) & (np.asarray(weights) > 0)
    return jnp.asarray(np.flatnonzero(active), jnp.int32)


def choose_steps(
    active: Int[Array, " A"], count: int | None, draw: tuple[int, ...]
) -> Int[Array, " K"]:
    """Choose steps uniformly without replacement.

    Args:
        active: the steps in play, `[A]`.
        count: K; None takes all.
        draw: what the draw is a function of: seed, iteration, and what tells this draw from others.

    Returns:
        Step numbers `[min(A, K)]`, in order.
    """
    if count is None or count >= len(active):
        return active
    chosen = np.random.default_rng(draw).choice(np.asarray(active), count, replace=False)
    return jnp.asarray(np.sort(chosen), jnp.int32)


def update_draw(seed: int, iteration: int, number: int) -> tuple[int, ...]:
    """Return what the draw of steps of an iteration's update is a function of.

    NumPy pads a seed with zeros: without an end of its own this would be, at the first update, the
    stream that an iteration's prompts are drawn from where they have weights (`(seed, iteration)`).
    """
    return (seed, iteration, number, 2)


def fraction_of(count: int, fraction: float) -> int:
    """Return how many of `count` steps a fraction is: rounded, at least one."""
    return max(1, round(fraction * count))


def clip_scale(
    schedule: Schedule,
    weights: Float[Array, " T"],
    active: Int[Array, " A"],
    latent_size: int,
    *,
    ratio: Ratio,
    reduction: Reduction,
    guard: bool = False,
) -> float:
    """Return how much wider a log-ratio spreads than one step's of a 64 × 64 × 4 latent, by mean.

    Under the old policy a step's log-ratio, averaged over D elements, is
    mean(z m) − mean(m²)/2 with m = Δμ/σ and z standard normal. Its spread is rms(m)/√D: √(D₀/D)
    times that at D₀ = 16384. The sum over the elements is D times the mean. The weighted sum over
    steps, which are independent, spreads as √Σ_t (w_t m_t)²; where the network's output changes
    alike at all steps, m_t is proportional to the `step_sensitivity` s_t, so relative to one step
    (of the steps' rms) that is √(Σ_t w_t² s_t² / mean_t s_t²), which is √n for n steps of weight 1.

    A clip range that is multiplied by this (in log ρ) limits the same change of the policy. The
    exponents of GRPO-Guard spread σ_t times as far, by the steps' rms
    √(mean_t σ_t² s_t² / mean_t s_t²) times.

    Args:
        schedule: T steps.
        weights: w_t.
        active: the steps summed.
        latent_size: D, elements of a latent.
        ratio: one an image, or one a step (then the sum over steps has one term).
        reduction: of the log-prob over the latent.
        guard: GRPO-Guard's normalization of a step's ratio.
    """
    scale = math.sqrt(NOMINAL_LATENT / latent_size) * (latent_size if reduction == "sum" else 1)
    index = np.asarray(active)
    s = np.asarray(step_sensitivity(schedule), np.float64)[index]
    if ratio == "step":
        factor = np.asarray(schedule.std, np.float64)[index] if guard else 1.0
        return scale * math.sqrt(np.square(factor * s).mean() / np.square(s).mean())
    w = np.asarray(weights, np.float64)[index]
    return scale * math.sqrt(np.square(w * s).sum() / np.square(s).mean())


def plan_steps(
    schedule: Schedule,
    *,
    latent_size: int,
    clip_low: float,
    clip_high: float,
    draw: tuple[int, int] = (0, 0),
    ratio: Ratio = "trajectory",
    reduction: Reduction = "mean",
    weights: StepWeights = "uniform",
    given: Sequence[float] = (),
    fraction: float = 1.0,
    gamma: float = 1.0,
    dual_clip: float | None = None,
    scale_clip: bool = True,
    guard: bool = False,
) -> StepPlan:
    """Decide an iteration's steps, weights and clip range; all active steps are differentiated.

    Args:
        schedule: T steps, those outside the window deterministic.
        latent_size: D.
        clip_low: ε_low, given for one step of a 64 × 64 × 4 latent and the mean reduction.
        clip_high: ε_high, likewise.
        draw: seed and iteration, of which the random fraction is a function.
        ratio: see `clip_scale`.
        reduction: see `clip_scale`.
        weights: see `step_weights`.
        given: see `step_weights`.
        fraction: share of the active steps that take part, drawn anew each iteration (DanceGRPO).
        gamma: γ of `discounts`.
        dual_clip: c, given as the clip range is.
        scale_clip: multiply the range by `clip_scale`; else it acts as it is.
        guard: see `clip_scale`.

    Returns:
        The plan, K = A.

    Raises:
        UsageError: as `step_weights`.
    """
    w = step_weights(schedule, weights, given)
    active = active_steps(schedule, w)
    # The tag (last) tells this draw from those of the gradient's steps.
    active = choose_steps(active, fraction_of(len(active), fraction), (*draw, 0, 1))
    scale = 1.0
    if scale_clip:
        scale = clip_scale(
            schedule, w, active, latent_size, ratio=ratio, reduction=reduction, guard=guard
        )
    low, high = scaled_clip(clip_low, clip_high, scale)
    dual = None if dual_clip is None else scaled_clip(0.5, dual_clip - 1, scale)[1] + 1
    return StepPlan(
        weights=w,
        active=active,
        steps=active,
        discounts=discounts(gamma, schedule.num_steps),
        clip_low=jnp.float32(low),
        clip_high=jnp.float32(high),
        dual_clip=None if dual is None else jnp.float32(dual),
    )
