"""All images of an iteration, a microbatch at a time: drawn, decoded, scored, and evaluated again.

One program serves every microbatch. On a CPU the microbatches of a rollout run beside each other
(`lanes.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_grpo.config import Config
from diffusion_grpo.divided_scoring import DividedScoring
from diffusion_grpo.gaussian import Reduction
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.lanes import Lanes
from diffusion_grpo.mesh import by_rows, join_rows, own_rows, resident, take_rows
from diffusion_grpo.pipeline import PolicyStructure, TrainablePolicy, make_sampler
from diffusion_grpo.pretrained import DTYPES
from diffusion_grpo.program_cache import network_jit, shared_programs
from diffusion_grpo.reward import Scoring
from diffusion_grpo.rollout import Trajectory, sample
from diffusion_grpo.schedule import Schedule
from diffusion_grpo.trajectories import PolicySteps, UpdateBatch, policy_steps


class Output(NamedTuple):
    """What becomes of clean latents, microbatch by microbatch, while others are drawn.

    Attributes:
        decode: latents → images; called in the lane that drew them.
        take: called with the images in their order, in the caller's thread.
    """

    decode: Callable[[jax.Array], Any]
    take: Callable[[Any], None]


def make_rollout(config: Config, policy: TrainablePolicy) -> Callable[..., Trajectory]:
    """Compile the sampler of one microbatch, and run it over all images of an iteration.

    Returns:
        (trained, frozen, schedule, initial noise, keys, conditioning, output=…) → the
        trajectories; `output` is given each microbatch's clean latents as soon as they are on their
        way (see `Output`).
    """
    draw = _recorder(
        policy.structure, config.grpo.log_prob_reduction, DTYPES[config.rollout.storage_dtype]
    )
    draw_parts = _over_microbatches(draw, config.rollout.images_at_once, lambda drawn: drawn.final)

    def rollout(*arguments: Any, output: Output | None = None) -> Trajectory:
        parts = draw_parts(*arguments, output=output)
        return Trajectory(
            join_rows([p.latents for p in parts], 1),
            parts[0].timesteps,
            join_rows([p.log_probs for p in parts], 1),
        )

    return rollout


@shared_programs
def _recorder(
    policy: PolicyStructure, reduction: Reduction, storage: Any
) -> Callable[..., Trajectory]:
    @network_jit
    def draw(
        trained: Any, frozen: Any, schedule: Schedule, noise: Any, keys: Any, conditioning: Any
    ) -> Trajectory:
        drawn = sample(
            policy.denoiser(trained, frozen),
            policy.noise(trained, schedule),
            noise,
            keys,
            conditioning,
            reduction=reduction,
            storage_dtype=storage,
        )
        return drawn._replace(
            latents=by_rows(drawn.latents, 1), log_probs=by_rows(drawn.log_probs, 1)
        )

    return draw


def make_final_rollout(config: Config, policy: TrainablePolicy) -> Callable[..., jax.Array]:
    """Compile the sampler that keeps the clean latents alone; called as `make_rollout`'s."""
    draw = make_sampler(policy.structure)
    draw_parts = _over_microbatches(draw, config.rollout.images_at_once, lambda drawn: drawn)

    def rollout(*arguments: Any, output: Output | None = None) -> jax.Array:
        return join_rows(draw_parts(*arguments, output=output))

    return rollout


def _over_microbatches(
    draw: Callable[..., Any], size: int, final_of: Callable[[Any], jax.Array]
) -> Callable[..., list[Any]]:
    """Return a sampler of all images, which returns what `draw` does for each `size` of them.

    Args:
        draw: the program of one microbatch: (trained, frozen, schedule, noise, keys, conditioning)
            → what is kept of it.
        size: images at a time.
        final_of: what is kept → the clean latents in it, for `Output.decode`.
    """
    lanes = Lanes()

    def draw_parts(
        trained: Any,
        frozen: Any,
        schedule: Schedule,
        noise: Any,
        keys: Any,
        conditioning: tuple[Any, Any],
        *,
        output: Output | None,
    ) -> list[Any]:
        prompts, negative = conditioning

        def draw_rows(rows: slice) -> tuple[Any, Any]:
            of_rows = jax.tree.map(lambda x: take_rows(x, rows), prompts)
            part = take_rows(noise, rows), take_rows(keys, rows), (of_rows, negative)
            with resident():
                drawn = draw(trained, frozen, schedule, *part)
            return drawn, None if output is None else output.decode(final_of(drawn))

        parts = []
        for drawn, images in lanes.run(
            [partial(draw_rows, rows) for rows in chunks(len(noise), size)]
        ):
            parts.append(drawn)
            if output is not None:
                output.take(images)
        return parts

    return draw_parts


def make_policy_steps(
    policy: TrainablePolicy, *, size: int, reduction: Reduction, means: bool
) -> Callable[..., PolicySteps]:
    """Compile what a policy says of recorded steps, `size` images at a time.

    Returns:
        (trained, frozen, schedule, batch, active steps) → its steps.
    """
    chunk = _describer(policy.structure, reduction, means=means)

    def steps(
        trained: Any, frozen: Any, schedule: Schedule, batch: UpdateBatch, active: Any
    ) -> PolicySteps:
        parts = [
            chunk(trained, frozen, schedule, batch.take(rows), active)
            for rows in chunks(len(batch.advantages), size)
        ]
        return jax.tree.map(lambda *leaves: join_rows(leaves, 1), *parts)

    return steps


@shared_programs
def _describer(
    policy: PolicyStructure, reduction: Reduction, *, means: bool
) -> Callable[..., PolicySteps]:
    @network_jit
    def describe(
        trained: Any, frozen: Any, schedule: Schedule, batch: UpdateBatch, active: Any
    ) -> PolicySteps:
        return policy_steps(
            policy.denoiser(trained, frozen),
            schedule,
            batch.trajectory.latents,
            batch.conditioning,
            active,
            reduction=reduction,
            means=means,
        )

    return describe


def chunks(count: int, size: int) -> list[slice]:
    """Return the rows of `count` images, `size` at a time."""
    return [slice(start, start + size) for start in range(0, count, size)]


def decoded_and_scored(
    decode: Any,
    images: list[Any],
    scoring: Scoring | DividedScoring,
    check: Callable[[], None] = do_nothing,
) -> Output:
    """Have what is drawn decoded, added to `images`, and handed to the rewards.

    Args:
        decode: latents → images.
        images: gets them, chunk by chunk.
        scoring: of the rewards.
        check: called with each chunk, and with no more than two of them under way, so that what it
            raises comes soon.
    """

    def take(chunk: Any) -> None:
        if len(images) > 1:
            jax.block_until_ready(images[-2])
        check()
        images.append(chunk)
        scoring.add(own_rows(chunk))

    return Output(decode, take)


def decode_chunks(decode: Any, latents: jax.Array, size: int) -> jax.Array:
    """Decode `size` images at a time."""
    return jnp.concatenate([decode(latents[rows]) for rows in chunks(len(latents), size)])
