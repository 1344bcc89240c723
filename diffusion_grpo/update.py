"""The gradient of GRPO over a batch of trajectories, at the cost of the steps it differentiates.

One step of one microbatch is differentiated at a time (`loss.py` says why that can be): memory
holds no more, whatever T and the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_grpo.accumulation import reduce_metrics, sum_in_lanes
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.lanes import Lanes
from diffusion_grpo.loss import CompiledLoss, Pulls, Shares
from diffusion_grpo.mesh import replicated, resident
from diffusion_grpo.schedule import Schedule
from diffusion_grpo.steps import StepPlan
from diffusion_grpo.trajectories import UpdateBatch


def make_gradient(loss: CompiledLoss) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Return the gradient of the GRPO loss, accumulated over microbatches and steps.

    A loop on the host calls the program that differentiates one step of one microbatch. So memory
    holds one step's activations whatever T and the batch, and one step is all that is compiled.
    (`lax.scan` around it would do the same in one program, but XLA's CPU backend runs the gradients
    of convolutions 10 times slower in a loop.)

    Args:
        loss: the compiled programs.

    Returns:
        `gradient(params, frozen, schedule, batch, plan, beta, on_policy=…) -> (gradient like
        params, metrics)`, where `frozen` are the network's other parameters (passed, so that no
        weight is compiled in), `plan` a `StepPlan` whose K steps' gradients are scaled by A/K, so
        that a uniform draw of K is an unbiased estimate, and `beta` the weight of the KL.
        `on_policy` says that θ sampled the batch, so that its log-probs are those recorded and no
        forward sweep is needed. Metrics: `loss`, `policy_loss`, `ratio/mean|min|max`,
        `clip_fraction`, `approx_kl`, `entropy`, `kl` where the loss has one, and `ratio/drift`
        where `on_policy`. `check=` is called before each microbatch, and may raise.
    """
    config = loss.config
    lanes = {True: Lanes(), False: Lanes()}  # on policy or not: programs of their own

    def gradient(
        params: Any,
        frozen: Any,
        schedule: Schedule,
        batch: UpdateBatch,
        plan: StepPlan,
        beta: Array,
        *,
        on_policy: bool,
        check: Callable[[], None] = do_nothing,
    ) -> tuple[Any, dict[str, Array]]:
        count, number = len(batch.advantages), len(plan.steps)
        shares = Shares(jnp.float32(len(plan.active) / number), jnp.float32(1 / number))
        peaks: list[Array] = []  # of each microbatch the images' largest |Δ log p|

        def add(total: Any, start: int) -> tuple[Any, list[dict[str, Array]]]:
            history: list[dict[str, Array]] = []
            mb = batch.take(slice(start, start + config.microbatch))
            zero = jnp.zeros_like(mb.advantages)
            pulls, common = Pulls(zero, zero, zero), (params, frozen, schedule, mb, plan, beta)
            peak = zero
            if config.sums_log_ratios:
                with resident():
                    pulls, metrics = loss.terms(*common, on_policy=on_policy)
                history.append(metrics)
            for k in range(number):
                step = plan.steps[k]
                with resident():
                    total, metrics, change = loss.accumulate(total, *common, step, pulls, shares)
                    peak = _peak(peak, change) if on_policy else peak
                history.append(metrics)
            peaks.append(peak)
            return total, history

        starts = range(0, count, config.microbatch)
        zeros = partial(loss.zeros, params)
        total, history = sum_in_lanes(lanes[on_policy], add, zeros, starts, check)
        metrics = reduce_metrics(history, count)
        if on_policy:  # later the policy has moved, and not the numerics alone
            metrics["ratio/drift"] = _largest(peaks)
        metrics["entropy"] = loss.entropy(params, schedule, batch, plan.active)
        metrics["loss"] = metrics["policy_loss"] - config.entropy_coeff * metrics["entropy"]
        if config.kl is not None:
            metrics["loss"] = metrics["loss"] + beta * metrics["kl"]
        return loss.mean(total, count), metrics

    return gradient


@jax.jit
def _peak(peak: Array, change: Array) -> Array:
    # By rows: a maximum over the images would be waited for at every step.
    return jnp.maximum(peak, jnp.abs(change))


@jax.jit
def _largest(peaks: list[Array]) -> Array:
    return replicated(jnp.stack([peak.max() for peak in peaks]).max())
