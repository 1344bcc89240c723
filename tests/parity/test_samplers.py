"""Samplers for inference against the Diffusers scheduler of the name, in torch."""

import importlib
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from diffusion_grpo.errors import UsageError
from diffusion_grpo.rollout import initial_noise
from diffusion_grpo.samplers import make_solver, solve
from diffusion_grpo.sampling import SAMPLERS
from diffusion_grpo.scheduler_config import SchedulerConfig

diffusers = importlib.import_module("diffusers")

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def latents(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 4, 4, 4)).astype(np.float32)


def denoiser(x, t, conditioning):
    return jnp.tanh(0.5 * x + conditioning + t.astype(jnp.float32) / 1000)


run = jax.jit(lambda solver, x, keys: solve(denoiser, solver, x, keys, 0.1, previews=True))


@pytest.mark.parametrize(
    ("sampler", "spacing", "prediction"),
    list(product(SAMPLERS, ("leading", "trailing", "linspace", None), ("epsilon", "v_prediction"))),
)
# Diffusers hands torch tensors to np.array, which NumPy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("steps", [12, 25])
def test_final_latents_equal_diffusers(sampler, spacing, prediction, steps, monkeypatch):
    options = STABLE_DIFFUSION | {"prediction_type": prediction, "clip_sample": False}
    if spacing is not None:
        options["timestep_spacing"] = spacing
    # As one converts the scheduler of a pipeline: each class has its own default for what the file
    # lacks.
    of_file = diffusers.PNDMScheduler.from_config(options).config
    theirs = getattr(diffusers, CLASSES[sampler]).from_config(of_file)
    theirs.set_timesteps(steps)
    config = SchedulerConfig.from_dict(options | {"_class_name": "PNDMScheduler"})
    solver = make_solver(config, sampler, steps)
    np.testing.assert_allclose(solver.timesteps, theirs.timesteps.numpy(), rtol=1e-6)

    start = latents(0)
    keys = jax.random.split(jax.random.key(0), 2)
    noises = iter(
        np.asarray(
            initial_noise(jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys), (4, 4, 4))
        )
        for i in range(steps)
    )
    x = torch.tensor(start) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        noise = torch.tensor(next(noises))
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, noise=noise, **k: noise)
        seen = theirs.scale_model_input(x, t)
        output = torch.tanh(0.5 * seen + 0.1 + t.float() / 1000)
        x = theirs.step(output, t, x).prev_sample
    final, previews = run(solver, start, keys)
    assert previews.shape == (steps, 2, 4, 4, 4)
    scale = float(x.abs().max())
    assert scale > 0.1
    assert np.abs(np.asarray(final) - x.numpy()).max() <= 2e-4 * scale


@pytest.mark.parametrize("sampler", ["dpm++", "euler", "ddpm"])
def test_perfect_prediction_is_recovered_exactly(sampler):
    """Whatever the coefficients: a network that knows x₀ leads every sampler to it."""
    config = SchedulerConfig.from_dict(
        STABLE_DIFFUSION | {"prediction_type": "sample", "clip_sample": False}
    )
    target = jnp.asarray(latents(3))
    final, _ = solve(
        lambda x, t, conditioning: target,
        make_solver(config, sampler, 9),
        jnp.asarray(latents(0)),
        jax.random.split(jax.random.key(0), 2),
        None,
    )
    np.testing.assert_allclose(final, target, atol=1e-5)


def test_wrong_samplers_are_refused():
    config = SchedulerConfig.from_dict(STABLE_DIFFUSION)
    with pytest.raises(UsageError, match="did you mean 'euler'"):
        make_solver(config, "eular", 10)
    with pytest.raises(UsageError, match="eta is 1.0, which only the sampler ddim has"):
        make_solver(config, "euler", 10, eta=1.0)
    with pytest.raises(UsageError, match="num_steps is 1000; expected 1 to 999"):
        make_solver(config, "dpm++", 1000)
