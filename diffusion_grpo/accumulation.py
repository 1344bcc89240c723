"""What steps and microbatches add up to: gradients by device, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_grpo.grpo import kl_estimate
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.lanes import Lanes
from diffusion_grpo.lanes import lanes as lane_count
from diffusion_grpo.mesh import AXES, by_rows, replicated, split_rows
from diffusion_grpo.models.kernels import of_one_shard
from diffusion_grpo.trajectories import UpdateBatch

# The metrics that are no sums, and how they are reduced.
EXTREMES = {"ratio/min": jnp.min, "ratio/max": jnp.max}


@partial(jax.jit, donate_argnums=0)
def divide(tree: Any, count: Array) -> Any:
    """Divide every leaf, in place."""
    return jax.tree.map(lambda x: x / count, tree)


def sum_in_lanes(
    lanes: Lanes,
    add: Callable[[Any, int], tuple[Any, list[dict[str, Array]]]],
    zeros: Callable[[], Any],
    starts: Sequence[int],
    check: Callable[[], None] = do_nothing,
) -> tuple[Any, list[dict[str, Array]]]:
    """Sum the gradients of microbatches, each lane those of its share, then over the lanes.

    Which microbatch is in which lane depends on how many there are of both, so that the sum is the
    same each time on as many cores, to the bit.

    Args:
        lanes: of the programs that `add` runs.
        add: (gradient so far, first row of a microbatch) → gradient with it, metrics.
        zeros: the gradient to start from.
        starts: first rows of the microbatches.
        check: called before each, and with no more than a few under way, so that what it raises
            comes soon.

    Returns:
        The gradient, and the metrics of all microbatches.
    """
    count = min(lane_count(), len(starts))

    def share(lane: int) -> tuple[Any, list[dict[str, Array]]]:
        total, history, ends = zeros(), [], []
        for start in starts[lane::count]:
            if len(ends) > 1:
                jax.block_until_ready(ends[-2])
            check()
            total, metrics = add(total, start)
            history += metrics
            ends.append(metrics)
        return total, history

    total, history = None, []
    for part, metrics in lanes.run([partial(share, lane) for lane in range(count)]):
        total = part if total is None else _plus(total, part)
        history += metrics
    return total, history


@partial(jax.jit, donate_argnums=0)
def _plus(tree: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, tree, other)


def reduce_metrics(history: list[dict[str, Array]], count: int) -> dict[str, Array]:
    """Reduce metrics of microbatches and steps: extremes, and sums of the rest by image."""
    stacked: dict[str, list[Array]] = {}
    for metrics in history:
        for name, value in metrics.items():
            stacked.setdefault(name, []).append(value)
    reduced = {}
    for name, values in stacked.items():
        joined = jnp.stack(values)
        reduced[name] = EXTREMES[name](joined) if name in EXTREMES else joined.sum() / count
    return reduced


def ratio_metrics(
    log_ratio: Array, clipped: Array, from_old: Array, elements: int
) -> dict[str, Array]:
    """Return sums over the images (extremes for min and max).

    Args:
        log_ratio: of the ratio that the loss has.
        clipped: where that has no gradient.
        from_old: log π_θ − log π_old, reduced over the latent, unweighted.
        elements: of `kl_estimate`.
    """
    ratio = jnp.exp(log_ratio)
    return {
        "ratio/mean": ratio.sum(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "clip_fraction": clipped.sum().astype(jnp.float32),
        # k3 with the roles of Schulman 2020: samples are the old policy's, so
        # δ = log π_old − log π_θ
        "approx_kl": kl_estimate(-from_old, "k3", elements=elements).sum(),
    }


def of_shards(
    step_loss: Any, gradient: Any, params: Any, mb: UpdateBatch, pulls: Any
) -> tuple[Any, dict[str, Array], Array]:
    """Add to each shard's gradient `[n, ...]` that of its own images, and sum up the metrics.

    Left to itself, every step of every microbatch would sum the gradient over the devices.
    """
    axes = mb.axes()
    of_each = jax.vmap(
        jax.grad(step_loss, has_aux=True), in_axes=(None, axes, 0), spmd_axis_name=AXES
    )
    with of_one_shard():
        new, (metrics, change) = of_each(
            params, split_rows(mb, axes), split_rows(pulls, jax.tree.map(lambda _: 0, pulls))
        )
    metrics = {name: EXTREMES.get(name, jnp.sum)(each) for name, each in metrics.items()}
    gradient = by_rows(jax.tree.map(jnp.add, gradient, new))
    return gradient, replicated(metrics), by_rows(change.reshape(-1))
