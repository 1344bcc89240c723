"""The denoising step against Diffusers' DDIMScheduler in torch."""

import importlib
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion_grpo.errors import UsageError
from diffusion_grpo.rollout import sample
from diffusion_grpo.schedule import (
    SchedulerConfig,
    add_noise,
    alphas_cumprod,
    make_schedule,
    predict_epsilon_x0,
    spaced_timesteps,
    step_distribution,
    velocity,
)

diffusers: Any = importlib.import_module("diffusers")  # lazy: its names are found at run time

STEPS = 10
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

all_steps = jax.jit(jax.vmap(step_distribution, in_axes=(None, 0, 0, 0)))
all_x0 = jax.jit(jax.vmap(predict_epsilon_x0, in_axes=(None, 0, 0, 0)))


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def latents(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 4, 4, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("spacing", "prediction", "offset", "to_one", "clip", "zero_snr"),
    list(product(SPACINGS, PREDICTIONS, (0, 1), (False, True), (False, True), (False, True))),
)
def test_step_equals_diffusers(spacing, prediction, offset, to_one, clip, zero_snr):
    options = dict(
        STABLE_DIFFUSION,
        timestep_spacing=spacing,
        prediction_type=prediction,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        clip_sample=clip,
        clip_sample_range=0.8,
        rescale_betas_zero_snr=zero_snr,
    )
    theirs = diffusers.DDIMScheduler(**options)
    theirs.set_timesteps(STEPS)
    config = SchedulerConfig.from_dict(dict(theirs.config))
    assert config == SchedulerConfig(**options)
    if prediction == "epsilon" and zero_snr and spacing != "leading":
        with pytest.raises(UsageError, match="epsilon"):
            make_schedule(config, STEPS, eta=1.0)
        return

    x, output, noise = (np.stack([latents(k + i) for i in range(STEPS)]) for k in (0, 100, 200))
    for eta in (0.0, 0.5, 1.0):
        schedule = make_schedule(config, STEPS, eta=eta)
        np.testing.assert_array_equal(schedule.timesteps, theirs.timesteps.numpy())
        steps = np.arange(STEPS)
        means, stds = map(np.asarray, all_steps(schedule, steps, x, output))
        x0s = all_x0(schedule, steps, x, output)[1]
        for i, t in enumerate(theirs.timesteps.tolist()):
            variance = float(theirs._get_variance(t, t - 1000 // STEPS))
            assert relative_error(stds[i], eta * variance**0.5) <= 1e-5

            def reference(z, t=t, i=i, eta=eta):
                return theirs.step(
                    torch.tensor(output[i]), t, torch.tensor(x[i]), eta, variance_noise=z
                )

            expected = reference(torch.zeros(x[i].shape))
            drawn = reference(torch.tensor(noise[i])).prev_sample
            mean = expected.prev_sample
            if eta == 1 and theirs.alphas_cumprod[t] == 0:
                # σ² = 1 − ᾱ_s exactly, so ε̂ has the factor 0. In float32 Diffusers is left with the
                # root of a rounding error, up to 2e-4 and sometimes NaN.
                mean = (
                    theirs.alphas_cumprod[t - 1000 // STEPS] ** 0.5 * expected.pred_original_sample
                )
                drawn = mean + variance**0.5 * torch.tensor(noise[i])
            assert relative_error(means[i], mean) <= 1e-5
            assert relative_error(means[i] + stds[i] * noise[i], drawn) <= 1e-5
            assert relative_error(x0s[i], expected.pred_original_sample) <= 1e-5


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_timesteps_equal_diffusers(spacing, steps):
    options = dict(STABLE_DIFFUSION, timestep_spacing=spacing)
    theirs = diffusers.DDIMScheduler(**options)
    theirs.set_timesteps(steps)
    timesteps = spaced_timesteps(SchedulerConfig(**options), steps)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy())


@pytest.mark.parametrize(
    "options",
    [
        STABLE_DIFFUSION,
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 4, "trained_betas": (0.1, 0.2, 0.3, 0.9)},
        {"num_train_timesteps": 1},
        {"num_train_timesteps": 50, "beta_end": 0.3},
    ],
)
def test_alphas_cumprod_equal_diffusers(options):
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(SchedulerConfig(**options)), theirs, rtol=2e-7)


@pytest.mark.parametrize("options", [STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"}])
def test_zero_terminal_snr_table_equals_diffusers(options):
    theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **options).alphas_cumprod.numpy()
    ours = alphas_cumprod(SchedulerConfig(rescale_betas_zero_snr=True, **options))
    assert ours[-1] == theirs[-1] == 0
    # torch's float32 square root is off by one bit in places, and the rescaling enlarges it.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_deterministic_sampler_equals_diffusers(spacing, prediction):
    options = dict(
        STABLE_DIFFUSION,
        timestep_spacing=spacing,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    theirs = diffusers.DDIMScheduler(**options)
    theirs.set_timesteps(STEPS)
    schedule = make_schedule(SchedulerConfig(**options), STEPS, eta=0.0)

    def denoiser(x, t, conditioning):
        return jnp.tanh(0.5 * x + conditioning + t.astype(jnp.float32) / 1000)

    initial = latents(0)
    keys = jax.random.split(jax.random.key(0), 2)
    trajectory = jax.jit(lambda x: sample(denoiser, schedule, x, keys, 0.1))(initial)

    x = torch.tensor(initial)
    for i, t in enumerate(theirs.timesteps):
        output = torch.tanh(0.5 * x + 0.1 + t.float() / 1000)
        x = theirs.step(output, int(t), x).prev_sample
        assert relative_error(trajectory.latents[i + 1], x) <= 2e-5
    assert not np.asarray(trajectory.log_probs).any()


@pytest.mark.parametrize(
    "written",
    [
        diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, steps_offset=1),
        diffusers.DDPMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
        diffusers.PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, steps_offset=1),
        diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True),
        diffusers.DPMSolverSinglestepScheduler(**STABLE_DIFFUSION),
        diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing"),
        diffusers.UniPCMultistepScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_config_of_any_class_is_read_as_diffusers_reads_it(written, tmp_path):
    written.save_pretrained(tmp_path)
    config = SchedulerConfig.from_dict(diffusers.DDIMScheduler.load_config(tmp_path))
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path).config
    ours = {"clip_sample", "default_spacing", "solver_options"}
    for name in set(SchedulerConfig.__dataclass_fields__) - ours:
        assert getattr(config, name) == theirs[name], name
    # DDIM's default is for pixels; the class that wrote the file may have no such option.
    assert config.clip_sample == written.config.get("clip_sample", False)


def test_our_config_loads_in_diffusers():
    config = SchedulerConfig(**STABLE_DIFFUSION, clip_sample=False, prediction_type="v_prediction")
    theirs = diffusers.DDIMScheduler.from_config(config.to_dict()).config
    assert SchedulerConfig.from_dict(dict(theirs)) == config


@pytest.mark.parametrize("file", [{}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_spacing_of_other_samplers_is_kept_in_our_config(kind, file):
    config = SchedulerConfig.from_dict(STABLE_DIFFUSION | file)
    theirs = getattr(diffusers, kind).from_config(config.to_dict()).config
    assert config.solver_spacing == theirs.timestep_spacing
    assert SchedulerConfig.from_dict(config.to_dict()).solver_spacing == config.solver_spacing


def test_forward_process_equals_diffusers():
    config = SchedulerConfig(**STABLE_DIFFUSION)
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    x0, noise, timesteps = latents(0), latents(1), np.array([3, 870])
    expected = theirs.add_noise(*map(torch.tensor, (x0, noise, timesteps)))
    table = alphas_cumprod(config)
    got = add_noise(table, jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(timesteps))
    assert relative_error(got, expected) <= 1e-6
    expected = theirs.get_velocity(*map(torch.tensor, (x0, noise, timesteps)))
    got = velocity(table, jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(timesteps))
    assert relative_error(got, expected) <= 1e-6
