"""Samplers for inference against the Diffusers scheduler of the name, in torch."""

import importlib
import re
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from torch_checkpoints import TWO_LEVELS, WIDTH, make_unet, randomize
from torch_weights import copy_torch_weights

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.rollout import initial_noise
from diffusion_grpo.samplers import make_solver, solve
from diffusion_grpo.sampling import SAMPLERS
from diffusion_grpo.scheduler_config import SchedulerConfig
from diffusion_grpo.tensors import abstract_module

diffusers = importlib.import_module("diffusers")

# Diffusers hands torch tensors to np.array, which NumPy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
SOLVERS = ("dpm++", "euler")
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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_eta_and_every_step_s_x0_equal_diffusers(sampler, monkeypatch):
    options = STABLE_DIFFUSION | {
        "timestep_spacing": "trailing",
        "clip_sample": True,  # dpm++ and euler do not read it
        "clip_sample_range": 0.7,
    }
    theirs, steps = of_diffusers(sampler, options), 12
    theirs.set_timesteps(steps)
    eta = 0.6 if sampler == "ddim" else 0.0
    solver = make_solver(SchedulerConfig.from_dict(options), sampler, steps, eta=eta)
    start, keys = latents(0), jax.random.split(jax.random.key(0), 2)
    x, clean = torch.tensor(start) * theirs.init_noise_sigma, []
    for i, t in enumerate(theirs.timesteps):
        of_step = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        noise = torch.tensor(np.asarray(initial_noise(of_step, (4, 4, 4))))
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, noise=noise, **k: noise)
        given = {"eta": eta, "variance_noise": noise} if sampler == "ddim" else {}
        output = torch.tanh(0.5 * theirs.scale_model_input(x, t) + 0.1 + t.float() / 1000)
        step = theirs.step(output, t, x, **given)
        x = step.prev_sample
        clean.append(getattr(step, "pred_original_sample", None))
    final, previews = run(solver, start, keys)
    assert np.abs(np.asarray(final) - x.numpy()).max() <= 2e-4 * float(x.abs().max())
    if sampler != "dpm++":  # which does not tell its x̂₀
        want = torch.stack(clean).numpy()
        assert np.abs(np.asarray(previews) - want).max() <= 2e-4 * np.abs(want).max()


def of_diffusers(sampler, options):
    return getattr(diffusers, CLASSES[sampler]).from_config(dict(options))


def drawn_by_diffusers(theirs, start, steps, network=None):
    """Draw without fresh noise; `network` is the one of `denoiser` if None."""
    theirs.set_timesteps(steps)
    # Without it Diffusers skips a level where Karras' first two timesteps round to the same one,
    # and then has one too few.
    theirs.set_begin_index(0)
    x = torch.tensor(start) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(x, t)
        output = network(seen, t) if network else torch.tanh(0.5 * seen + 0.1 + t.float() / 1000)
        x = theirs.step(output, t, x).prev_sample
    return x.numpy()


KARRAS = {"use_karras_sigmas": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize("steps", [1, 7, 20, 61, 130])
@pytest.mark.parametrize(
    "options",
    [STABLE_DIFFUSION | {"timestep_spacing": s} for s in ("leading", "trailing", "linspace")]
    + [STABLE_DIFFUSION, {"beta_schedule": "linear"}, COSINE, ZERO_SNR],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_karras_timesteps_and_noise_levels_equal_diffusers(sampler, options, steps):
    theirs = of_diffusers(sampler, options | KARRAS)
    theirs.set_timesteps(steps)
    solver = make_solver(SchedulerConfig.from_dict(options | KARRAS), sampler, steps)
    # 0.002 timesteps are an error of 1e-5 in σ. Integer timesteps are the same.
    np.testing.assert_allclose(solver.timesteps, theirs.timesteps.numpy(), rtol=0, atol=2e-3)
    levels = np.asarray(solver.noise_scale) / np.asarray(solver.signal_scale)
    np.testing.assert_allclose(levels, theirs.sigmas[:-1].numpy(), rtol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("options", [STABLE_DIFFUSION, ZERO_SNR, COSINE])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_final_latents_with_karras_sigmas_equal_diffusers(sampler, spacing, options, prediction):
    file = options | KARRAS | {"prediction_type": prediction, "timestep_spacing": spacing}
    start = latents(0)
    want = drawn_by_diffusers(of_diffusers(sampler, file), start, 25)
    solver = make_solver(SchedulerConfig.from_dict(file | {"clip_sample": False}), sampler, 25)
    got, _ = run(solver, start, jax.random.split(jax.random.key(0), 2))
    assert np.abs(np.asarray(got) - want).max() <= 2e-4 * np.abs(want).max()


def test_pictures_of_a_network_with_karras_sigmas_equal_diffusers():
    file = STABLE_DIFFUSION | KARRAS
    torch.manual_seed(0)
    network: Any = randomize(make_unet(**TWO_LEVELS))
    config = UNetConfig.from_dict(dict(network.config))
    unet = abstract_module(UNet2DConditionModel, config, dtype=jnp.float32)
    copy_torch_weights(network, unet)
    text = np.random.default_rng(1).normal(size=(2, 5, WIDTH)).astype(np.float32)
    start = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)

    @jax.jit
    def draw(unet, solver, x, keys, text):
        def predict(x, t, text):
            return unet(x, jnp.full(len(x), t), text)

        return solve(predict, solver, x, keys, text)[0]

    for sampler in SOLVERS:
        with torch.no_grad():
            want = drawn_by_diffusers(
                of_diffusers(sampler, file),
                start,
                10,
                lambda x, t: network(x, t, torch.tensor(text)).sample,
            )
        solver = make_solver(SchedulerConfig.from_dict(file), sampler, 10)
        keys = jax.random.split(jax.random.key(0), 2)
        got = draw(unet, solver, start.transpose(0, 2, 3, 1), keys, text)
        got = np.asarray(got).transpose(0, 3, 1, 2)
        assert np.abs(got - want).max() <= 5e-4 * np.abs(want).max(), sampler


@pytest.mark.parametrize("sampler", SOLVERS)
def test_the_least_signal_of_a_cosine_schedule_is_that_of_diffusers(sampler):
    file = COSINE | {"timestep_spacing": "trailing"}
    theirs = of_diffusers(sampler, file)
    theirs.set_timesteps(10)
    solver = make_solver(SchedulerConfig.from_dict(file), sampler, 10)
    levels = np.asarray(solver.noise_scale) / np.asarray(solver.signal_scale)
    np.testing.assert_allclose(levels, theirs.sigmas[:-1].numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "name", "value"),
    [(sampler, "use_exponential_sigmas", True) for sampler in SOLVERS]
    + [(sampler, "use_beta_sigmas", True) for sampler in SOLVERS]
    + [(sampler, "final_sigmas_type", "sigma_min") for sampler in SOLVERS]
    + [("euler", "interpolation_type", "log_linear")]
    + [("dpm++", "solver_order", order) for order in (1, 3)]
    + [("dpm++", "solver_type", "heun")]
    + [("dpm++", "algorithm_type", "sde-dpmsolver++")]
    + [("dpm++", "use_lu_lambdas", True)]
    + [("dpm++", "lambda_min_clipped", -2.0)],
)
def test_options_that_change_what_diffusers_draws_are_refused(sampler, name, value):
    file = STABLE_DIFFUSION | {name: value}
    start = latents(0)
    plain = drawn_by_diffusers(of_diffusers(sampler, STABLE_DIFFUSION), start, 20)
    changed = drawn_by_diffusers(of_diffusers(sampler, file), start, 20)
    assert np.abs(changed - plain).max() > 0.01

    config = SchedulerConfig.from_dict(file)
    message = re.escape(f"{name} = {value!r}, which the sampler {sampler} does not support")
    with pytest.raises(UsageError, match=message):
        make_solver(config, sampler, 20)
    for other in ("ddim", "ddpm", *SOLVERS):
        if name not in getattr(diffusers, CLASSES[other])().config:
            make_solver(config, other, 20)


@pytest.mark.parametrize("value", ["fixed_large", "fixed_large_log"])
def test_a_larger_variance_is_refused_by_the_sampler_that_has_one(value):
    file = STABLE_DIFFUSION | {"variance_type": value}
    small, large = of_diffusers("ddpm", STABLE_DIFFUSION), of_diffusers("ddpm", file)
    assert large._get_variance(500) != small._get_variance(500)
    config = SchedulerConfig.from_dict(file)
    with pytest.raises(UsageError, match=f"variance_type = '{value}', which the sampler ddpm"):
        make_solver(config, "ddpm", 20)
    for other in ("ddim", *SOLVERS):
        make_solver(config, other, 20)


@pytest.mark.parametrize("name", ["use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_two_kinds_of_noise_levels_are_refused_as_in_diffusers(sampler, name):
    file = STABLE_DIFFUSION | KARRAS | {name: True}
    with pytest.raises(ValueError, match="Only one of"):
        of_diffusers(sampler, file)
    with pytest.raises(UsageError, match=f"{name} = True"):
        make_solver(SchedulerConfig.from_dict(file), sampler, 20)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("euler", {name: value})
        for name, value in {
            "solver_order": 3,
            "solver_type": "heun",
            "algorithm_type": "dpmsolver",
            "use_lu_lambdas": True,
            "lambda_min_clipped": -2.0,
            "lower_order_final": False,
            "euler_at_final": True,
            "final_sigmas_type": "zero",
            "interpolation_type": "linear",
        }.items()
    ]
    + [
        ("dpm++", {name: value})
        for name, value in {
            "solver_order": 2,
            "solver_type": "bh2",
            "algorithm_type": "dpmsolver++",
            "lambda_min_clipped": -5.1,
            "lower_order_final": False,
            "euler_at_final": True,
            "final_sigmas_type": "zero",
            "interpolation_type": "log_linear",
        }.items()
    ],
)
@pytest.mark.parametrize("steps", [4, 20])
def test_options_that_change_nothing_in_diffusers_change_nothing(sampler, options, steps):
    for plain in (STABLE_DIFFUSION, STABLE_DIFFUSION | KARRAS):
        assert_drawn_alike(sampler, plain, plain | options, steps)


def test_karras_levels_go_before_lu_lambdas_and_clipping_as_in_diffusers():
    plain = STABLE_DIFFUSION | KARRAS
    moot = {"use_lu_lambdas": True, "lambda_min_clipped": -2.0}
    assert_drawn_alike("dpm++", plain, plain | moot, 20)


def assert_drawn_alike(sampler, plain, changed, steps):
    """Assert that a change of the file is none to Diffusers, and that we draw the same."""
    start = latents(0)
    want = drawn_by_diffusers(of_diffusers(sampler, plain), start, steps)
    same = drawn_by_diffusers(of_diffusers(sampler, changed), start, steps)
    np.testing.assert_array_equal(same, want)
    config = SchedulerConfig.from_dict(changed | {"clip_sample": False})
    solver = make_solver(config, sampler, steps)
    got, _ = run(solver, start, jax.random.split(jax.random.key(0), 2))
    assert np.abs(np.asarray(got) - want).max() <= 2e-4 * np.abs(want).max()


def test_the_name_of_deis_is_that_of_dpm_solver_plus_plus_as_in_diffusers():
    file = STABLE_DIFFUSION | {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"}
    assert of_diffusers("dpm++", file).config.algorithm_type == "dpmsolver++"
    file["final_sigmas_type"] = "zero"
    make_solver(SchedulerConfig.from_dict(file), "dpm++", 20)
    with pytest.raises(UsageError, match="'dpmsolver', which .* Expected 'dpmsolver[+]{2}' or 'de"):
        make_solver(SchedulerConfig.from_dict(file | {"algorithm_type": "dpmsolver"}), "dpm++", 20)


@pytest.mark.parametrize("value", [1, "true"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_karras_option_that_is_no_boolean_is_refused(sampler, value):
    config = SchedulerConfig.from_dict(STABLE_DIFFUSION | {"use_karras_sigmas": value})
    with pytest.raises(UsageError, match=f"use_karras_sigmas = {value!r}.* Expected False or True"):
        make_solver(config, sampler, 20)
    make_solver(config, "ddim", 20)


def test_only_euler_and_dpm_solver_read_karras_sigmas():
    files = (STABLE_DIFFUSION, STABLE_DIFFUSION | KARRAS)
    for sampler in SAMPLERS:
        plain, karras = (make_solver(SchedulerConfig.from_dict(f), sampler, 20) for f in files)
        same = jax.tree.map(np.array_equal, plain, karras)
        assert all(jax.tree.leaves(same)) == (sampler not in SOLVERS), sampler


@pytest.mark.parametrize("sampler", SOLVERS)
def test_options_of_the_solvers_are_kept_in_our_config(sampler):
    file = STABLE_DIFFUSION | KARRAS | {"final_sigmas_type": "sigma_min", "solver_order": 3}
    ours = SchedulerConfig.from_dict(file | {"clip_sample": False}).to_dict()
    assert dict(of_diffusers(sampler, ours).config).items() >= (KARRAS | file).items()
    assert SchedulerConfig.from_dict(ours).to_dict() == ours


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
