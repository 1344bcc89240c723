"""The drift probe: do rollout and update agree on the log-probs of unchanged parameters?

They run in two compiled programs. A difference between them looks like a change of the policy, and
where it is as large as the clip range, clipping answers to rounding and not to learning.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.loss import CompiledLoss, Pulls, Shares
from diffusion_grpo.mesh import to_host
from diffusion_grpo.schedule import Schedule
from diffusion_grpo.steps import StepPlan
from diffusion_grpo.trajectories import UpdateBatch


def measure_drift(
    loss: CompiledLoss,
    params: Any,
    frozen: Any,
    schedule: Schedule,
    batch: UpdateBatch,
    plan: StepPlan,
) -> np.ndarray:
    """Return |Δ log p| between rollout and update at the parameters that sampled the rollout.

    By the very programs that the update runs: for a trajectory's ratio the sweep over all images,
    for the ratios of single steps the gradient of the first microbatch.

    Args:
        loss: the compiled programs.
        params: the trained parameters, as they sampled.
        frozen: the others.
        schedule: of the rollout.
        batch: the trajectories, with advantages of any value.
        plan: the steps, and w_t.

    Returns:
        float64: |Σ_t w_t Δ log p_t| of each image, or |Δ log p_t| of each step of each image of the
        microbatch (with GRPO-Guard times σ_t, as in the ratio); in nats by the reduction of the
        log-prob.
    """
    size, zero = loss.config.microbatch, jnp.float32(0)
    changes = []
    for start in range(0, len(batch.advantages), size):
        mb = batch.take(slice(start, start + size))
        common = (params, frozen, schedule, mb, plan, zero)
        if loss.config.ratio == "trajectory":
            pulls, _ = loss.terms(*common, on_policy=False)
            changes.append(pulls.log_ratio)
            continue
        none = Pulls(*3 * [jnp.zeros_like(mb.advantages)])
        for i in plan.active:
            empty = loss.zeros(params)
            change = loss.accumulate(empty, *common, i, none, Shares(zero, zero))[2]
            changes.append(change * schedule.std[i] if loss.config.guard else change)
        break
    return np.abs(np.concatenate([to_host(change).astype(np.float64) for change in changes]))


def check_drift(drift: np.ndarray, plan: StepPlan, *, clips: bool, allow: bool) -> str:
    """Compare the drift with the clip range, and say both.

    Args:
        drift: of `measure_drift`.
        plan: with the range.
        clips: whether the loss clips ratios at all.
        allow: go on although the 99th percentile is beyond the range.

    Returns:
        One line for the user.

    Raises:
        UsageError: it is, and that is not allowed; or the drift is not finite.
    """
    p50, p99 = np.percentile(drift, [50, 99])
    # A range so wide that float32 rounds its lower end to 0 has no lower end.
    low = -math.log1p(-min(float(plan.clip_low), 1 - 1e-7))
    high = math.log1p(float(plan.clip_high))
    line = f"drift of log-probs between rollout and update: p50 {p50:.2g}, p99 {p99:.2g}"
    if not np.isfinite(drift).all():
        raise UsageError(
            f"{line}: not finite; expected finite log-probs. Likely the model's outputs overflow "
            "in model.dtype"
        )
    if not clips:
        return line
    line += f"; the clip range is {low:.2g} down and {high:.2g} up in log ρ"
    if p99 > min(low, high) and not allow:
        raise UsageError(
            f"{line}. Clipping would answer to rounding and not to learning; expected a drift "
            "within the range: raise grpo.clip_low and clip_high, set model.dtype = 'float32', or "
            "train all the same with --grpo.allow-drift True"
        )
    return line
