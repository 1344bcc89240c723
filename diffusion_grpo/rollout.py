"""The sampler: one scan over the denoising steps, with the log-prob of each.

`denoising_step` serves the sampler and the recomputation of log-probs alike, so that at unchanged
parameters the two agree to the last bit and the ratio of new to old is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion_grpo.gaussian import Reduction, gaussian_log_prob
from diffusion_grpo.schedule import Schedule, step_distribution

# (latents [B, h, w, c], timestep scalar int32 or [B], conditioning) -> the model's output, like the
# latents. Conditioning is any pytree with leading axis B.
Denoiser = Callable[[Array, Array, Any], Array]

# (sample [B, h, w, c], timesteps [B] int32, conditioning) -> like the sample.
UNetApply = Callable[[Array, Array, Any], Array]

Purpose = Literal[
    "initial_noise", "step_noise", "evaluation_initial", "evaluation_step", "loss", "adapter"
]

# Part of the reproducibility of a run: never renumber, only append.
_PURPOSES: dict[Purpose, int] = {
    "initial_noise": 0,
    "step_noise": 1,
    "evaluation_initial": 2,
    "evaluation_step": 3,
    "loss": 4,
    "adapter": 5,
}


class Trajectory(NamedTuple):
    """All T denoising steps of B images.

    Attributes:
        latents: `[T+1, B, h, w, c]` in the storage dtype, from initial noise to clean latent.
        timesteps: int32 `[T]`; step i leads from `latents[i]` at `timesteps[i]` to `latents[i+1]`.
        log_probs: float32 `[T, B]`; log-prob of `latents[i+1]`, 0 for a deterministic step.
    """

    latents: Any
    timesteps: Any
    log_probs: Any

    @property
    def final(self) -> Any:
        """The clean latents `[B, h, w, c]`."""
        return self.latents[-1]


def guided(unet_apply: UNetApply, guidance_scale: float) -> Denoiser:
    """Return the denoiser with classifier-free guidance, ε_u + s (ε_c − ε_u) (Ho & Salimans 2022).

    Both go through the UNet in one call: of each prompt first its images unconditionally, then the
    same by the prompt. So those that are divided over devices stay there, where all unconditional
    ones first would have half of them change places. Up to guidance_scale 1 there is no guidance,
    as in Diffusers: the output is ε_c, and ε_u is not computed. (Distilled models are meant to be
    drawn at 0.)

    Args:
        unet_apply: (sample, timesteps [B], conditioning) -> output.
        guidance_scale: s, a Python number: it decides what is compiled.

    Returns:
        A denoiser whose conditioning is a pair of pytrees of one structure, the prompts' with
        leaves [P, ...], each of B/P consecutive images, and the negative prompt's with leaves
        [1 or P, ...]; its output is float32.
    """

    def denoise(latents: Array, timestep: Array, conditioning: Any) -> Array:
        prompts, negative = conditioning
        batch = latents.shape[0]
        timesteps = jnp.broadcast_to(timestep, (batch,))
        if guidance_scale <= 1:
            return unet_apply(latents, timesteps, prompts).astype(jnp.float32)
        groups = jax.tree.leaves(prompts)[0].shape[0]
        both = partial(_alternate, groups=groups)
        output = unet_apply(
            both(latents, latents),
            both(timesteps, timesteps),
            jax.tree.map(lambda u, c: both(jnp.broadcast_to(u, c.shape), c), negative, prompts),
        ).astype(jnp.float32)
        halves = output.reshape(groups, 2, -1, *latents.shape[1:])
        unconditional, conditional = (halves[:, i].reshape(latents.shape) for i in (0, 1))
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise


def _alternate(first: Array, second: Array, groups: int) -> Array:
    """Put equal groups of the rows of two arrays one after another, `[B, …]` twice to `[2B, …]`."""
    shape = second.shape[1:]
    parts = [x.astype(second.dtype).reshape(groups, -1, *shape) for x in (first, second)]
    return jnp.concatenate(parts, axis=1).reshape(-1, *shape)


def purpose_key(seed: int, purpose: Purpose) -> Key[Array, ""]:
    """Return the run's random key for a purpose; purposes are independent of one another."""
    return jax.random.fold_in(jax.random.key(seed), _PURPOSES[purpose])


def image_keys(
    seed: int,
    iteration: Int[Array, ""] | int,
    prompt_index: Int[Any, " B"],
    image_index: Int[Any, " B"],
    purpose: Purpose,
) -> Key[Array, " B"]:
    """Return one random key an image, a function of who the image is and of nothing else.

    fold_in of (seed, purpose, iteration, prompt index, image index): so a picture depends neither
    on the batch it is drawn in nor on the devices. Images given the same indices share their noise.

    Args:
        seed: the run's seed.
        iteration: of the run, 0 or more.
        prompt_index: int [B], each prompt's place in its list (not in the batch).
        image_index: int [B], each image's place in its group.
        purpose: what the numbers are for; purposes are independent of one another.

    Returns:
        Keys [B].
    """
    key = jax.random.fold_in(purpose_key(seed, purpose), iteration)

    def fold(prompt: Array, image: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, prompt), image)

    return jax.vmap(fold)(
        jnp.asarray(prompt_index, jnp.uint32), jnp.asarray(image_index, jnp.uint32)
    )


def initial_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, " B *latent"]:
    """Draw x_T ~ N(0, I), one latent a key.

    Args:
        keys: [B]; equal keys give equal latents (one initial noise for a whole group).
        shape: of one latent, (h, w, c).

    Returns:
        float32 [B, h, w, c].
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def fold_each(keys: Key[Array, " B"], number: Int[Array, ""] | int) -> Key[Array, " B"]:
    """Return fold_in(key, number) of every image's key, such as for the noise of one step."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def step_noise(
    keys: Key[Array, " B"], i: Int[Array, ""] | int, shape: tuple[int, ...]
) -> Float[Array, " B *latent"]:
    """Draw z ~ N(0, I), the noise of step i, from fold_in(key, i) of every image.

    Args:
        keys: [B], of the steps' noise.
        i: the step's index.
        shape: of one latent, (h, w, c).

    Returns:
        float32 [B, h, w, c].
    """
    return initial_noise(fold_each(keys, i), shape)


def denoising_step(
    denoiser: Denoiser,
    schedule: Schedule,
    i: Int[Array, " ..."] | int,
    x_t: Float[Array, " B *latent"],
    conditioning: Any,
) -> tuple[Float[Array, " B *latent"], Float[Array, " ..."]]:
    """Return mean and standard deviation of the step from x_t.

    Args:
        denoiser: the policy.
        schedule: T steps.
        i: the step's index, a scalar or one an image [B].
        x_t: latents in their storage dtype.
        conditioning: what the denoiser is conditioned on.

    Returns:
        μ, float32, like `x_t`, and σ_t, float32, like `i`.
    """
    # Storage dtypes are exact in float32, and the model casts to its own compute dtype.
    x_t = x_t.astype(jnp.float32)
    output = denoiser(x_t, schedule.timesteps[i], conditioning)
    mean, std = step_distribution(schedule, i, x_t, output)
    # XLA may fuse the mean differently into the sampler, the recomputation and the gradient, and
    # contract other multiply-adds. Behind the barrier the three share one computation of it.
    return jax.lax.optimization_barrier(mean), std


def _store(x: Float[Array, " B *latent"], dtype: Any) -> Array:
    """Round to the storage dtype, such that no later computation sees the unrounded value.

    XLA may drop a cast to bfloat16 and back ("excess precision"), which would take the log-prob of
    a sample that is stored nowhere; `reduce_precision` is never dropped.
    """
    info = jnp.finfo(dtype)
    if info.bits < 32:
        x = jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return jax.lax.optimization_barrier(x.astype(dtype))


def _draw(
    denoiser: Denoiser,
    schedule: Schedule,
    i: Array,
    x_t: Array,
    noise_keys: Array,
    conditioning: Any,
) -> tuple[Array, Array, Array]:
    """Take one step: (x_s in the dtype of x_t, μ, σ)."""
    mean, std = denoising_step(denoiser, schedule, i, x_t, conditioning)
    noise = step_noise(noise_keys, i, x_t.shape[1:])
    return _store(mean + std * noise, x_t.dtype), mean, std


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    initial: Float[Array, " B *latent"],
    noise_keys: Key[Array, " B"],
    conditioning: Any,
    *,
    reduction: Reduction = "mean",
    storage_dtype: Any = jnp.float32,
) -> Trajectory:
    """Draw B trajectories, and the log-prob of every step.

    Each new latent is cast to `storage_dtype` before its log-prob is taken and before the next step
    sees it: so what is recorded is what was drawn, and a recomputation finds the same log-prob.

    Args:
        denoiser: the policy.
        schedule: T steps.
        initial: x_T ~ N(0, I).
        noise_keys: [B]; step i of an image uses fold_in(key, i).
        conditioning: what the denoiser is conditioned on.
        reduction: of the log-prob over the latent.
        storage_dtype: of the latents kept: float32, bfloat16 or float16.

    Returns:
        The trajectory.
    """

    def step(x_t: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
        x_s, mean, std = _draw(denoiser, schedule, i, x_t, noise_keys, conditioning)
        return x_s, (x_s, gaussian_log_prob(x_s, mean, std, reduction=reduction))

    start = _store(initial.astype(jnp.float32), storage_dtype)
    _, (latents, log_probs) = jax.lax.scan(step, start, jnp.arange(schedule.num_steps))
    return Trajectory(jnp.concatenate([start[None], latents]), schedule.timesteps, log_probs)


def sample_final(
    denoiser: Denoiser,
    schedule: Schedule,
    initial: Float[Array, " B *latent"],
    noise_keys: Key[Array, " B"],
    conditioning: Any,
    *,
    storage_dtype: Any = jnp.float32,
) -> Float[Array, " B *latent"]:
    """Draw B images and return the clean latents alone: for evaluation, where memory is one step's.

    Args:
        denoiser: the policy.
        schedule: T steps.
        initial: x_T ~ N(0, I).
        noise_keys: [B], as in `sample`; without effect on deterministic steps.
        conditioning: what the denoiser is conditioned on.
        storage_dtype: between the steps, as in `sample`.

    Returns:
        x_0, `[B, h, w, c]` in `storage_dtype`, equal to the last latents of `sample`.
    """

    def step(x_t: Array, i: Array) -> tuple[Array, None]:
        return _draw(denoiser, schedule, i, x_t, noise_keys, conditioning)[0], None

    start = _store(initial.astype(jnp.float32), storage_dtype)
    return jax.lax.scan(step, start, jnp.arange(schedule.num_steps))[0]


def trajectory_log_probs(
    denoiser: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    conditioning: Any,
    reduction: Reduction,
) -> Float[Array, " T B"]:
    """Recompute the log-probs of recorded steps under a policy.

    At the parameters that drew the trajectory the result equals `trajectory.log_probs` exactly,
    given the same batch and schedule, and that both are compiled.

    Args:
        denoiser: the policy.
        schedule: the T steps that the trajectory was drawn with.
        trajectory: the recorded latents.
        conditioning: what the denoiser is conditioned on.
        reduction: of the log-prob over the latent.

    Returns:
        float32 [T, B].
    """

    def step(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, Array]:
        i, x_t, x_s = inputs
        mean, std = denoising_step(denoiser, schedule, i, x_t, conditioning)
        return None, gaussian_log_prob(x_s, mean, std, reduction=reduction)

    steps = jnp.arange(schedule.num_steps)
    latents = trajectory.latents
    return jax.lax.scan(step, None, (steps, latents[:-1], latents[1:]))[1]
