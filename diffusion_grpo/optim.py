"""Optimizers, learning rates and parameter averages by name; one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from diffusion_grpo.learning_sections import OptimConfig
from diffusion_grpo.mesh import Place, replicated, resident
from diffusion_grpo.program_cache import shared_programs


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        params: the trained parameters, float32.
        opt_state: the optimizer's.
        average: exponential moving average of the parameters, or None without one.
        nonfinite: int32 scalar, how many updates in a row were skipped just now.
    """

    params: Any
    opt_state: Any
    average: Any = None
    nonfinite: Any = np.int32(0)

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate and export: the average where there is one."""
        return self.params if self.average is None else self.average


def learning_rate(options: OptimConfig, iterations: int) -> Callable[[Any], Any]:
    """Return iteration → learning rate, for numbers and traced arrays alike.

    Linear warm-up (i+1)/(w+1) over the first w iterations, then `constant`, or down to
    `final_learning_rate` at the end of the run by `linear` or by half a `cosine` (Loshchilov &
    Hutter 2017, eq. 5).

    Args:
        options: see `OptimConfig`.
        iterations: of the whole run.
    """
    warmup, peak, final = (
        options.warmup_iterations,
        options.learning_rate,
        options.final_learning_rate,
    )
    length = max(1, iterations - warmup)

    def rate(iteration: Any) -> Any:
        ramp = jnp.minimum(1.0, (iteration + 1) / (warmup + 1))
        if options.schedule == "constant":
            return peak * ramp
        progress = jnp.clip((iteration - warmup) / length, 0.0, 1.0)
        left = 1 - progress
        if options.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(math.pi * progress))
        return ramp * (final + (peak - final) * left)

    return rate


@shared_programs
def make_optimizer(
    options: OptimConfig, updates_per_rollout: int, iterations: int
) -> tuple[optax.GradientTransformation, Callable[[int], float]]:
    """Return the optimizer behind a clip of the global gradient norm, and iteration → rate.

    `adamw` (Loshchilov & Hutter 2019), `lion` (Chen et al. 2023), or `adafactor` (Shazeer & Stern
    2018) with update clipping at 1, without momentum and without scaling by the parameters' size.
    Weight decay is decoupled and times the learning rate in all three.

    Args:
        options: see `OptimConfig`.
        updates_per_rollout: optimizer steps an iteration.
        iterations: of the whole run.
    """
    rate = learning_rate(options, iterations)
    if options.optimizer == "adamw":
        core = optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=options.eps)
    elif options.optimizer == "lion":
        core = optax.scale_by_lion(b1=options.beta1, b2=options.beta2)
    else:
        core = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))

    def rate_of_update(update: Any) -> Any:
        return rate(update // updates_per_rollout)

    mask = _matrices if options.weight_decay_on == "matrices" else None
    optimizer = optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        core,
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.scale_by_learning_rate(rate_of_update),
    )
    return optimizer, lambda iteration: float(rate(iteration))


def _counts_updates(state: Any) -> bool:
    """Whether a part of the optimizer's state is what the learning rate depends on."""
    return isinstance(state, optax.ScaleByScheduleState)


def _matrices(params: Any) -> Any:
    """Say which parameters have two axes or more: no bias, no scale of a norm."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def moved_average(average: Any, params: Any, decay: Array) -> Any:
    """Return decay · average + (1 − decay) · params."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)


def make_update(
    gradient_of: Callable[..., tuple[Any, dict[str, Array]]],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    place: Place = replicated,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compile one optimizer step on a gradient.

    Args:
        gradient_of: (params, …) → (gradient, metrics).
        optimizer: Optax's transformation.
        ema_decay: d of the average d·average + (1−d)·params, taken after every step; None for none.
        place: lays the state out over the devices.

    Returns:
        `update(state, …) -> (state, metrics)`; the state is donated, and the rest is handed to
        `gradient_of`. Metrics are its own, `loss` among them, with `grad_norm` (before clipping).
        A loss or a gradient that is not finite leaves parameters, moments and average as they were;
        `skipped` is 1 then, and the state's `nonfinite` and the learning rate go on.
    """
    apply = _applied(optimizer, ema_decay, place)

    def update(
        state: TrainState, *arguments: Any, **options: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        gradient, metrics = gradient_of(state.params, *arguments, **options)
        with resident():
            state, applied = apply(state, gradient, metrics["loss"])
        return state, metrics | applied

    return update


@shared_programs
def _applied(
    optimizer: optax.GradientTransformation, ema_decay: float | None, place: Place
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    @partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, gradient: Any, loss: Array) -> tuple[TrainState, dict[str, Array]]:
        norm = optax.tree.norm(gradient)
        # Optax raises a float to an integer count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params, average = optax.apply_updates(state.params, changes), state.average
        if ema_decay is not None:
            average = moved_average(average, params, jnp.float32(ema_decay))
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        in_a_row = jnp.where(finite, jnp.int32(0), state.nonfinite + jnp.int32(1))
        new = TrainState(params, opt_state, average, state.nonfinite)
        state = jax.tree.map(
            lambda a, b: a if _counts_updates(a) else jnp.where(finite, a, b),
            new,
            state,
            is_leaf=_counts_updates,
        )
        state = state._replace(nonfinite=in_a_row)
        metrics = {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
        return place(state), replicated(metrics)

    return apply
