"""The sampler, its log-probs and their recomputation, with a small real network."""

from functools import lru_cache
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import as_users_compile
from schedulers import scheduler

from diffusion_grpo.rollout import (
    Purpose,
    denoising_step,
    guided,
    image_keys,
    initial_noise,
    sample,
    sample_final,
    trajectory_log_probs,
)
from diffusion_grpo.schedule import gaussian_log_prob, make_schedule

STEPS, BATCH, SHAPE = 6, 3, (8, 8, 4)
CONFIG = scheduler()


class TinyUNet(nnx.Module):
    """Convolutions, a group norm, a time embedding and attention to the prompt."""

    def __init__(self, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv_in = nnx.Conv(4, 16, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.time = nnx.Linear(8, 16, dtype=dtype, rngs=rngs)
        self.query = nnx.Linear(16, 8, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(8, 16, dtype=dtype, rngs=rngs)
        self.conv_out = nnx.Conv(16, 4, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x, timesteps, embeds):
        angles = timesteps.astype(jnp.float32)[:, None] * jnp.array([[1e-3, 1e-2, 0.1, 1.0]])
        time = self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1))
        hidden = self.norm(self.conv_in(x).astype(jnp.float32)).astype(time.dtype)
        hidden = nnx.silu(hidden) + time[:, None, None, :]
        scores = jnp.einsum("bhwd,bnd->bhwn", self.query(hidden), embeds.astype(hidden.dtype))
        attended = jnp.einsum("bhwn,bnd->bhwd", nnx.softmax(scores), self.value(embeds))
        return self.conv_out(nnx.silu(hidden + attended))


@lru_cache
def policy(dtype=jnp.float32, guidance_scale=3.0):
    """Return (parameters, parameters -> denoiser)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: TinyUNet(dtype=dtype, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), state
    )

    def denoiser(state, raw=False):
        def network(*inputs):
            return nnx.merge(graphdef, state)(*inputs)

        return network if raw else guided(network, guidance_scale)

    return state, denoiser


def conditioning(batch=BATCH):
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(8, 5, 8)).astype(np.float32)[:batch]
    return jnp.asarray(prompt), jnp.asarray(rng.normal(size=(1, 5, 8)).astype(np.float32))


@lru_cache
def noise_for(indices):
    """Return the initial noise and the noise keys of the images with these indices."""
    prompts, images = np.array(indices) // 4, np.array(indices) % 4
    initial = initial_noise(image_keys(0, 0, prompts, images, "initial_noise"), SHAPE)
    return initial, image_keys(0, 0, prompts, images, "step_noise")


@lru_cache
def compiled_sampler(denoiser, function, **options):
    """Compile a sampler once for all tests that use it; most of the time here is compilation."""

    @as_users_compile
    def run(state, schedule, initial, keys, cond):
        return function(denoiser(state), schedule, initial, keys, cond, **options)

    return run


def draw(state, denoiser, schedule, *, function=sample, **options):
    run = compiled_sampler(denoiser, function, **options)
    return run(state, schedule, *noise_for(range(BATCH)), conditioning())


@pytest.mark.parametrize(
    ("compute_dtype", "storage_dtype", "reduction", "eta"),
    [
        (jnp.float32, jnp.float32, "mean", 0.3),
        (jnp.float32, jnp.bfloat16, "mean", 1.0),
        (jnp.bfloat16, jnp.bfloat16, "sum", 0.3),
    ],
)
def test_ratio_is_exactly_one_at_unchanged_parameters(compute_dtype, storage_dtype, reduction, eta):
    state, denoiser = policy(compute_dtype)
    schedule = make_schedule(CONFIG, STEPS, eta=eta)
    trajectory = draw(state, denoiser, schedule, reduction=reduction, storage_dtype=storage_dtype)
    assert trajectory.latents.shape == (STEPS + 1, BATCH, *SHAPE)
    assert trajectory.latents.dtype == storage_dtype
    assert trajectory.log_probs.shape == (STEPS, BATCH)
    assert trajectory.log_probs.dtype == jnp.float32
    np.testing.assert_array_equal(trajectory.timesteps, schedule.timesteps)

    @as_users_compile
    def recompute(state, schedule, trajectory, cond):
        return trajectory_log_probs(denoiser(state), schedule, trajectory, cond, reduction)

    again = recompute(state, schedule, trajectory, conditioning())
    assert float(jnp.abs(jnp.exp(again - trajectory.log_probs) - 1).max()) == 0

    # The comparison can fail: other parameters give other log-probs.
    moved = jax.tree.map(lambda leaf: leaf * jnp.asarray(1.01, leaf.dtype), state)
    assert np.abs(recompute(moved, schedule, trajectory, conditioning()) - again).max() > 1e-4


@pytest.mark.parametrize("storage_dtype", [jnp.float32, jnp.bfloat16])
def test_ratio_is_exactly_one_in_the_program_of_the_gradient(storage_dtype):
    state, denoiser = policy()
    schedule = make_schedule(CONFIG, STEPS, eta=1.0)
    trajectory = draw(state, denoiser, schedule, reduction="mean", storage_dtype=storage_dtype)

    @as_users_compile
    def one_step(state, i, x_t, x_s, cond):
        def log_prob(state):
            step = jax.checkpoint(
                lambda state: denoising_step(denoiser(state), schedule, i, x_t, cond)
            )
            value = gaussian_log_prob(x_s, *step(state), reduction="mean")
            return value.sum(), value

        return jax.value_and_grad(log_prob, has_aux=True)(state)

    for i in range(STEPS):
        latents = trajectory.latents[i : i + 2]
        (_, value), gradient = one_step(state, i, latents[0], latents[1], conditioning())
        np.testing.assert_array_equal(value, trajectory.log_probs[i])
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_log_probs_are_those_of_the_stored_latents():
    # bfloat16 latents and their log-probs, both re-derived in float64 from what is stored.
    state, denoiser = policy()
    schedule = make_schedule(CONFIG, STEPS, eta=1.0)
    trajectory = draw(state, denoiser, schedule, reduction="mean", storage_dtype=jnp.bfloat16)
    for i in range(STEPS):
        x_t, x_s = trajectory.latents[i], np.asarray(trajectory.latents[i + 1], np.float64)
        mean, std = denoising_step(denoiser(state), schedule, i, x_t, conditioning())
        mean, std = np.asarray(mean, np.float64), float(std)
        dense = -((x_s - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(trajectory.log_probs[i], dense.mean((1, 2, 3)), rtol=1e-5)


def test_draws_have_the_step_s_mean_and_standard_deviation():
    schedule = make_schedule(CONFIG, STEPS, eta=1.0)
    initial = jnp.ones((1, 64, 64, 4))
    keys = jax.random.split(jax.random.key(1), 1)
    trajectory = sample(lambda x, t, c: jnp.zeros_like(x), schedule, initial, keys, None)
    for i in range(STEPS):
        x_t, x_s = trajectory.latents[i], trajectory.latents[i + 1]
        mean, std = denoising_step(lambda x, t, c: jnp.zeros_like(x), schedule, i, x_t, None)
        z = np.asarray((x_s - mean) / std, np.float64)
        assert abs(z.mean()) < 0.03  # 16384 draws: standard errors .008 and .006
        assert abs(z.std() - 1) < 0.03


def test_deterministic_steps_have_log_prob_zero_and_gradient_zero():
    state, denoiser = policy()
    mask = [True, False, True, True, False, False]
    schedule = make_schedule(CONFIG, STEPS, eta=1.0, stochastic_steps=mask)
    trajectory = draw(state, denoiser, schedule, reduction="mean", storage_dtype=jnp.float32)
    assert (np.asarray(trajectory.log_probs) != 0).all(axis=1).tolist() == mask
    assert (np.asarray(trajectory.log_probs) == 0).all(axis=1).tolist() == [not m for m in mask]

    @jax.jit
    def gradient(state, weights):
        def total(state):
            log_probs = trajectory_log_probs(
                denoiser(state), schedule, trajectory, conditioning(), "mean"
            )
            return (weights[:, None] * log_probs).sum()

        return jax.grad(total)(state)

    deterministic = gradient(state, 1 - jnp.array(mask, jnp.float32))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(deterministic))
    everything = gradient(state, jnp.ones(STEPS))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(everything))


@pytest.mark.parametrize("storage_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_final_latents_equal_those_of_the_trajectory(eta, storage_dtype):
    state, denoiser = policy()
    schedule = make_schedule(CONFIG, STEPS, eta=eta)
    trajectory = draw(state, denoiser, schedule, reduction="mean", storage_dtype=storage_dtype)
    final = draw(state, denoiser, schedule, function=sample_final, storage_dtype=storage_dtype)
    np.testing.assert_array_equal(final, trajectory.final)


def test_the_sampler_chains_the_step_function_with_the_documented_noise():
    state, denoiser = policy()
    schedule = make_schedule(CONFIG, STEPS, eta=1.0)
    trajectory = draw(state, denoiser, schedule, reduction="mean", storage_dtype=jnp.float32)
    x, keys = noise_for(range(BATCH))
    for i in range(STEPS):
        mean, std = denoising_step(denoiser(state), schedule, i, x, conditioning())
        noise = [jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in keys]
        x = mean + std * jnp.stack(noise)
        np.testing.assert_allclose(trajectory.latents[i + 1], x, atol=2e-4)


def test_guidance_equals_two_calls_of_the_network():
    state, denoiser = policy()
    network = jax.jit(denoiser(state, raw=True))
    x, _ = noise_for(range(BATCH))
    prompt, negative = conditioning()
    timestep = jnp.asarray(499, jnp.int32)
    timesteps = jnp.full((BATCH,), 499, jnp.int32)
    conditional = network(x, timesteps, prompt)
    unconditional = network(x, timesteps, jnp.repeat(negative, BATCH, axis=0))
    for scale in (0.0, 0.5, 1.0, 4.5):  # Diffusers: no guidance up to 1, the prompt alone
        want = unconditional + max(scale, 1.0) * (conditional - unconditional)
        got = guided(network, scale)(x, timestep, (prompt, negative))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, BATCH), (0, BATCH), (2.0, 2 * BATCH)])
def test_guidance_is_one_call_of_the_network_and_none_in_vain(scale, rows):
    calls = []

    def network(x, timesteps, embeds):
        calls.append((x.shape[0], timesteps.shape[0], embeds.shape[0]))
        return x.astype(jnp.bfloat16)

    x, _ = noise_for(range(BATCH))
    prompt, negative = conditioning()
    output = guided(network, scale)(x, jnp.asarray(3, jnp.int32), (prompt, negative))
    assert calls == [(rows, rows, rows)]
    assert output.dtype == jnp.float32


def test_a_picture_does_not_depend_on_its_batch():
    # With an elementwise network, whose arithmetic is the same in any batch.
    schedule = make_schedule(CONFIG, STEPS, eta=1.0)

    @jax.jit
    def run(initial, keys):
        return sample(lambda x, t, c: 0.3 * x, schedule, initial, keys, None).latents

    whole, part = noise_for(range(8)), noise_for((5, 2, 7))
    chosen = np.array([5, 2, 7])
    np.testing.assert_array_equal(part[0], whole[0][chosen])
    for a, b in zip(
        jax.random.key_data(part[1]), jax.random.key_data(whole[1])[chosen], strict=True
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(run(*part), run(*whole)[:, chosen], rtol=1e-6, atol=1e-6)


def test_every_coordinate_of_a_key_matters_and_equal_ones_agree():
    def key(seed=0, iteration: Any = 0, prompt=0, image=0, purpose: Purpose = "step_noise"):
        keys = image_keys(seed, iteration, np.array([prompt]), np.array([image]), purpose)
        return tuple(np.asarray(jax.random.key_data(keys)).ravel().tolist())

    keys = [
        key(),
        key(seed=1),
        key(iteration=1),
        key(prompt=1),
        key(image=1),
        key(purpose="initial_noise"),
        key(purpose="evaluation_initial"),
        key(purpose="evaluation_step"),
        key(purpose="loss"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(iteration=jnp.asarray(0))


def test_a_key_is_folded_from_seed_purpose_iteration_prompt_and_image_in_this_order():
    # As runs of earlier versions have drawn: a number here is never another purpose's.
    purposes: tuple[Purpose, ...] = (
        "initial_noise", "step_noise", "evaluation_initial", "evaluation_step", "loss", "adapter",
    )  # fmt: skip
    for number, purpose in enumerate(purposes):
        (found,) = image_keys(3, 7, np.array([5]), np.array([2]), purpose)
        want = jax.random.key(3)
        for part in (number, 7, 5, 2):
            want = jax.random.fold_in(want, part)
        assert found == want


def test_equal_keys_share_the_initial_noise_of_a_group():
    keys = image_keys(0, 0, np.array([1, 1, 2]), np.array([0, 0, 0]), "initial_noise")
    noise = initial_noise(keys, SHAPE)
    np.testing.assert_array_equal(noise[0], noise[1])
    assert np.abs(noise[0] - noise[2]).max() > 0.5
