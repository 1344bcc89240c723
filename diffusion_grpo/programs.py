"""The arguments that an iteration's compiled programs are called with, by shape alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_grpo.config import Config
from diffusion_grpo.learning import GRPOLearner, NFTLearner
from diffusion_grpo.loss import Pulls, Shares
from diffusion_grpo.nft import NFTBatch
from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.pretrained import DTYPES
from diffusion_grpo.rollout import Trajectory
from diffusion_grpo.trajectories import PolicySteps, UpdateBatch


def noise_steps(config: Config) -> int | None:
    """Return T where the policy learns a noise scale of each step, else None."""
    return config.rollout.num_steps if config.grpo.learn_noise_scale else None


def shape_of(array: Any, *lead: int) -> jax.ShapeDtypeStruct:
    """Return an array's shape and type, with other leading axes in place of its first."""
    shape = (*lead, *array.shape[1:]) if lead else array.shape
    return jax.ShapeDtypeStruct(shape, array.dtype)


def update_arguments(
    learner: GRPOLearner | NFTLearner, policy: TrainablePolicy, noise: Any, conditioning: Any
) -> tuple[Any, ...]:
    """Return what `accumulate` of the learner's loss is called with for one microbatch.

    Args:
        learner: of the run.
        policy: arrays, or shapes of them.
        noise: x_T of a microbatch `[b, h, w, c]`, or its shape.
        conditioning: of the microbatch, or its shapes.

    Returns:
        Shapes of everything large; schedule and plan are arrays.
    """
    trained, frozen = (jax.tree.map(shape_of, p) for p in (policy.trained, policy.frozen))
    if isinstance(learner, NFTLearner):
        batch = _nft_batch(learner.config.nft.timesteps, noise.shape, conditioning)
        number, index = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        return trained, trained, trained, trained, frozen, batch, number, index, number
    schedule = learner.schedule(0)
    plan = learner.plan(schedule, 0)
    steps, count = schedule.num_steps, noise.shape[0]
    storage = DTYPES[learner.config.rollout.storage_dtype]

    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    each, log_probs = shape(count), shape(steps, count)
    means, needs = shape(steps, *noise.shape), learner.loss.config
    reference, old = PolicySteps(), PolicySteps()
    if needs.needs_reference_means or needs.needs_reference_log_probs:
        reference = PolicySteps(means if needs.needs_reference_means else None, log_probs)
    if needs.needs_old_means:
        old = PolicySteps(means, log_probs)
    batch = UpdateBatch(
        Trajectory(shape(steps + 1, *noise.shape, dtype=storage), schedule.timesteps, log_probs),
        jax.tree.map(shape_of, conditioning),
        each,
        reference,
        old,
    )
    number, index = shape(), shape(dtype=jnp.int32)
    pulls, shares = Pulls(each, each, each), Shares(number, number)
    return trained, trained, frozen, schedule, batch, plan, number, index, pulls, shares


def _nft_batch(timesteps: int, shape: tuple[int, ...], conditioning: Any) -> NFTBatch:
    count = shape[0]
    return NFTBatch(
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.tree.map(shape_of, conditioning),
        jax.ShapeDtypeStruct((count,), jnp.float32),
        jax.ShapeDtypeStruct((count, timesteps), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)),
    )
