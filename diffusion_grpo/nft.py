"""DiffusionNFT: learn from rewards through the forward process, without log-probs.

The final latents of a rollout are noised again, and the network is trained to denoise them: toward
the good ones and away from the bad ones, relative to an old policy that follows it as an average.
The sampler may be any, deterministic ones included. Source: Zheng et al. 2025, "DiffusionNFT:
Online Diffusion Reinforcement with Forward Process".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion_grpo.accumulation import divide, sum_in_lanes
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.lanes import Lanes
from diffusion_grpo.loss import Policy
from diffusion_grpo.mesh import Place, replicated, resident, take_rows
from diffusion_grpo.program_cache import network_jit
from diffusion_grpo.rollout import fold_each, initial_noise
from diffusion_grpo.schedule import PredictionType, add_noise, epsilon_x0


@dataclasses.dataclass(frozen=True)
class NFTConfig:
    """What the loss computes; every field is static in the compiled program.

    Attributes:
        prediction_type: what the network's output is.
        beta: how far the positive and the negative policy are from the old one.
        advantage_max: the advantage whose image counts as all good (and −that as all bad).
        penalty: add the mean square of the difference to the reference's output to the loss.
        microbatch: images differentiated at a time.
    """

    prediction_type: PredictionType = "v_prediction"
    beta: float = 0.5
    advantage_max: float = 5.0
    penalty: bool = False
    microbatch: int = 8


class NFTBatch(NamedTuple):
    """The images of one iteration.

    Attributes:
        x0: clean latents `[B, h, w, c]`.
        conditioning: what the denoiser is conditioned on; leaves `[B, ...]` or `[1, ...]`.
        advantages: `[B]`.
        timesteps: int32 `[B, n]`, to which each image is noised.
        keys: `[B]`, of the noise.
    """

    x0: Any
    conditioning: Any
    advantages: Any
    timesteps: Any
    keys: Any

    def take(self, rows: Any) -> NFTBatch:
        """Return the batch of some images, given as a slice or as their places."""
        count = self.x0.shape[0]
        return jax.tree.map(lambda x: take_rows(x, rows) if x.shape[0] == count else x, self)


def nft_losses(
    x0_new: Float[Array, " B *latent"],
    x0_old: Float[Array, " B *latent"],
    x0: Float[Array, " B *latent"],
    advantages: Float[Array, " B"],
    *,
    beta: float,
    advantage_max: float,
) -> Float[Array, " B"]:
    """Return DiffusionNFT's loss of each image, in the form it has for predictions of x₀.

    (A_max/β) (r ‖x̂⁺ − x₀‖²/|x̂⁺ − x₀| + (1−r) ‖x̂⁻ − x₀‖²/|x̂⁻ − x₀|), with the optimality
    r = clip(A/(2 A_max) + ½, 0, 1), the positive policy x̂⁺ = x̂_old + β (x̂_new − x̂_old), the
    negative x̂⁻ = x̂_old − β (x̂_new − x̂_old), means over the latent, and the denominators (the
    weights that normalize themselves) without gradient. Where A = 0 for all, x̂_new = x̂_old is the
    minimum.

    Args:
        x0_new: x̂₀ of the trained policy.
        x0_old: x̂₀ of the old one; no gradient passes.
        x0: the clean latents.
        advantages: A.
        beta: β > 0.
        advantage_max: A_max > 0.

    Returns:
        Losses [B], float32.
    """
    axes = tuple(range(1, x0.ndim))
    x0_old = jax.lax.stop_gradient(x0_old)
    step = beta * (x0_new - x0_old)
    optimality = jnp.clip(advantages / (2 * advantage_max) + 0.5, 0.0, 1.0)

    def distance(prediction: Array) -> Array:
        error = prediction - x0
        size = jnp.maximum(jnp.abs(error).mean(axes), 1e-5)
        return jnp.square(error).mean(axes) / jax.lax.stop_gradient(size)

    loss = optimality * distance(x0_old + step) + (1 - optimality) * distance(x0_old - step)
    return advantage_max / beta * loss


def draw_timesteps(
    keys: Key[Array, " B"], timesteps: Int[Array, " T"], count: int
) -> Int[Array, "B n"]:
    """Draw `count` of the sampler's timesteps for each image, without replacement."""
    return jax.vmap(lambda key: jax.random.permutation(key, timesteps)[:count])(keys)


class CompiledNFT(NamedTuple):
    """The compiled program of the loss; see `compile_nft`."""

    config: NFTConfig
    accumulate: Any


def compile_nft(
    policy: Policy, config: NFTConfig, alphas_cumprod: np.ndarray, *, place: Place = replicated
) -> CompiledNFT:
    """Compile the program that differentiates one timestep of one microbatch.

    For ε-prediction the errors of x̂₀ are multiplied by √ᾱ_t, which makes them √(1−ᾱ_t) times those
    of ε̂, as for v-prediction they are √(1−ᾱ_t) times those of v. As published they would be
    √((1−ᾱ_t)/ᾱ_t) times, without a bound: 14 at Stable Diffusion's noisiest timestep, whose
    gradient, the least informative of all, would be most of the sum.

    Args:
        policy: (trained, frozen parameters) → denoiser.
        config: see `NFTConfig`.
        alphas_cumprod: ᾱ of the training timesteps.
        place: lays the gradient out over the devices, as the trained parameters are.
    """
    signal_scale = jnp.asarray(np.sqrt(alphas_cumprod), jnp.float32)
    noise_scale = jnp.asarray(np.sqrt(1 - alphas_cumprod), jnp.float32)

    @partial(network_jit, donate_argnums=0)
    def accumulate(
        gradient: Any,
        params: Any,
        old: Any,
        reference: Any,
        frozen: Any,
        mb: NFTBatch,
        beta: Array,
        j: Array,
        share: Array,
    ) -> tuple[Any, dict[str, Array]]:
        timesteps = mb.timesteps[:, j]
        signal, noise = signal_scale[timesteps], noise_scale[timesteps]
        x0 = mb.x0.astype(jnp.float32)
        drawn = initial_noise(fold_each(mb.keys, j), x0.shape[1:])
        x_t = add_noise(alphas_cumprod, x0, drawn, timesteps)

        def run(params: Any) -> Array:
            return policy(params, frozen)(x_t, timesteps, mb.conditioning).astype(jnp.float32)

        def weighted(x: Array) -> Array:
            if config.prediction_type != "epsilon":
                return x
            return x * signal.reshape((-1,) + (1,) * (x.ndim - 1))

        def weighted_x0(output: Array) -> Array:
            _, predicted = epsilon_x0(
                config.prediction_type, x_t, output, signal_scale=signal, noise_scale=noise
            )
            return weighted(predicted)

        output_old = run(old)
        output_reference = run(reference) if config.penalty else None

        def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
            output = run(params)
            losses = nft_losses(
                weighted_x0(output),
                weighted_x0(output_old),
                weighted(x0),
                mb.advantages,
                beta=config.beta,
                advantage_max=config.advantage_max,
            )
            loss = share * losses.sum()
            metrics = {
                "policy_loss": loss,
                "old_distance": share * _mean_square(output - output_old).sum(),
            }
            if output_reference is not None:
                kl = share * _mean_square(output - output_reference).sum()
                loss, metrics = loss + beta * kl, metrics | {"kl": kl}
            return loss, metrics

        new, metrics = jax.grad(loss_of, has_aux=True)(params)
        return place(jax.tree.map(jnp.add, gradient, new)), replicated(metrics)

    return CompiledNFT(config, accumulate)


def _mean_square(x: Float[Array, " B *latent"]) -> Float[Array, " B"]:
    return jnp.square(x).mean(tuple(range(1, x.ndim)))


def make_nft_gradient(loss: CompiledNFT) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Return the gradient of the loss, accumulated over microbatches and timesteps on the host.

    Args:
        loss: the compiled program.

    Returns:
        `gradient(params, old, reference, frozen, batch, beta) -> (gradient like params, metrics)`,
        with the old policy's and the reference's parameters like `params`, and `beta` the weight of
        the penalty, the mean square of output − output_ref. `check=` is called before each
        microbatch, and may raise. Metrics: `loss`, `policy_loss`, `old_distance` (the same mean
        square, to the old policy's output), and `kl`, the penalty without its weight, where
        `NFTConfig.penalty` is on.
    """
    config, lanes = loss.config, Lanes()

    def gradient(
        params: Any,
        old: Any,
        reference: Any,
        frozen: Any,
        batch: NFTBatch,
        beta: Array,
        *,
        check: Callable[[], None] = do_nothing,
    ) -> tuple[Any, dict[str, Array]]:
        count, number = batch.timesteps.shape
        share = jnp.float32(1 / number)

        def add(total: Any, start: int) -> tuple[Any, list[dict[str, Array]]]:
            history: list[dict[str, Array]] = []
            mb = batch.take(slice(start, start + config.microbatch))
            for j in range(number):
                step = jnp.int32(j)
                with resident():
                    total, metrics = loss.accumulate(
                        total, params, old, reference, frozen, mb, beta, step, share
                    )
                history.append(metrics)
            return total, history

        starts = range(0, count, config.microbatch)
        zeros = partial(jax.tree.map, jnp.zeros_like, params)
        total, history = sum_in_lanes(lanes, add, zeros, starts, check)
        metrics = {
            name: jnp.stack([values[name] for values in history]).sum() / count
            for name in history[0]
        }
        metrics["loss"] = metrics["policy_loss"]
        if config.penalty:
            metrics["loss"] = metrics["loss"] + beta * metrics["kl"]
        return divide(total, jnp.float32(count)), metrics

    return gradient
