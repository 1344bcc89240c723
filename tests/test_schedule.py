"""Schedules, log-densities and weights against SciPy and float64 re-derivations."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedulers import scheduler
from scipy.stats import norm

from diffusion_grpo.errors import UsageError
from diffusion_grpo.schedule import (
    SchedulerConfig,
    add_noise,
    alphas_cumprod,
    gaussian_kl,
    gaussian_log_prob,
    make_schedule,
    spaced_timesteps,
    step_distribution,
    step_sensitivity,
    velocity,
)
from diffusion_grpo.steps import step_weights

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def latents(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(3, 4, 4, 2))).astype(np.float32)


def derive(options: SchedulerConfig, num_steps: int, i: int, eta: float, x, output):
    """Re-derive one step in float64: eq. 12 and 16 of the DDIM paper, without clipping."""
    start, end, total = options.beta_start**0.5, options.beta_end**0.5, options.num_train_timesteps
    abar = np.cumprod(1 - np.linspace(start, end, total) ** 2)
    t = round(total - i * total / num_steps) - 1
    s = t - total // num_steps
    a, b = abar[t], abar[s] if s >= 0 else abar[0]
    x, output = np.asarray(x, np.float64), np.asarray(output, np.float64)
    if options.prediction_type == "epsilon":
        eps, x0 = output, (x - np.sqrt(1 - a) * output) / np.sqrt(a)
    elif options.prediction_type == "v_prediction":
        eps = np.sqrt(a) * output + np.sqrt(1 - a) * x
        x0 = np.sqrt(a) * x - np.sqrt(1 - a) * output
    else:
        eps, x0 = (x - np.sqrt(a) * output) / np.sqrt(1 - a), output
    sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    return np.sqrt(b) * x0 + np.sqrt(1 - b - sigma**2) * eps, sigma


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_step_and_log_prob_equal_a_float64_derivation(prediction, eta):
    options = scheduler(prediction_type=prediction)
    schedule = make_schedule(options, 10, eta=eta)
    for i in range(9):  # the last step's σ holds 1 − ᾱ₀, which float32 tables know to 1e-5 only
        x, output, noise = latents(i), latents(50 + i), latents(90 + i)
        mean, std = step_distribution(schedule, i, jnp.asarray(x), jnp.asarray(output))
        expected_mean, expected_std = derive(options, 10, i, eta, x, output)
        scale = np.abs(expected_mean).max()
        np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(std, expected_std, rtol=1e-5)

        drawn = np.asarray(mean + std * noise)
        dense = norm.logpdf(np.float64(drawn), np.asarray(mean, np.float64), float(std))
        for reduction in ("mean", "sum"):
            got = gaussian_log_prob(jnp.asarray(drawn), mean, std, reduction=reduction)
            want = getattr(dense, reduction)(axis=(1, 2, 3))
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_standard_deviation_of_draws_is_sigma():
    schedule = make_schedule(scheduler(), 10, eta=1.0)
    x = jnp.zeros((1, 100, 100, 4))
    mean, std = step_distribution(schedule, 4, x, x + 0.3)
    drawn = mean + std * jax.random.normal(jax.random.key(0), x.shape)
    abar = alphas_cumprod(scheduler())
    posterior = (1 - abar[499]) / (1 - abar[599]) * (1 - abar[599] / abar[499])
    np.testing.assert_allclose(drawn.std(), math.sqrt(posterior), rtol=0.02)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_forward_process_and_its_velocity_are_those_of_the_roots_in_float64(on_device):
    table = alphas_cumprod(scheduler())
    x0, noise, t = latents(0), latents(1), np.array([0, 400, 999])
    signal, scale = (np.sqrt(part)[t, None, None, None] for part in (table, 1 - table))
    given = jnp.asarray(table, jnp.float32) if on_device else table
    arguments = (given, jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(t, jnp.int32))
    if on_device:  # a table on the device may be traced
        noised, target = (jax.jit(function)(*arguments) for function in (add_noise, velocity))
    else:
        noised, target = add_noise(*arguments), velocity(*arguments)
    # Near t = 0, 1 − ᾱ of a float32 table has lost digits.
    tolerance = {"rtol": 0, "atol": 2e-5 if on_device else 3e-7}
    np.testing.assert_allclose(noised, signal * x0 + scale * noise, **tolerance)
    np.testing.assert_allclose(target, signal * noise - scale * x0, **tolerance)


def test_ancestral_step_is_the_ddpm_posterior():
    # η = 1 over every timestep: μ = √ᾱ_s β/(1−ᾱ_t) x₀ + √α (1−ᾱ_s)/(1−ᾱ_t) x_t (Ho et al., eq. 7).
    options = scheduler(prediction_type="sample", num_train_timesteps=20, beta_end=0.3)
    schedule = make_schedule(options, 20, eta=1.0)
    abar = alphas_cumprod(options)
    x, x0 = latents(0), latents(1)
    for i in range(19):
        t = 19 - i
        alpha = abar[t] / abar[t - 1]
        want = np.sqrt(abar[t - 1]) * (1 - alpha) / (1 - abar[t]) * x0
        want += np.sqrt(alpha) * (1 - abar[t - 1]) / (1 - abar[t]) * x
        mean, _ = step_distribution(schedule, i, jnp.asarray(x), jnp.asarray(x0))
        np.testing.assert_allclose(mean, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_perfect_prediction_keeps_the_marginal():
    # With the true ε, x_s of a deterministic step is exactly the forward process at s.
    options = scheduler(prediction_type="epsilon")
    schedule = make_schedule(options, 10, eta=0.0)
    abar = alphas_cumprod(options)
    x0, noise = latents(0), latents(1)
    x_t = np.sqrt(abar[699]) * x0 + np.sqrt(1 - abar[699]) * noise
    mean, _ = step_distribution(
        schedule, 3, jnp.asarray(x_t.astype(np.float32)), jnp.asarray(noise)
    )
    want = np.sqrt(abar[599]) * x0 + np.sqrt(1 - abar[599]) * noise
    np.testing.assert_allclose(mean, want, atol=1e-5)


def test_step_is_float32_whatever_the_inputs():
    schedule = make_schedule(scheduler(), 10, eta=1.0)
    x, output = latents(0), latents(1)
    half = [jnp.asarray(value, jnp.bfloat16) for value in (x, output)]
    mean, std = step_distribution(schedule, 2, *half)
    assert mean.dtype == std.dtype == jnp.float32
    exact, _ = step_distribution(schedule, 2, *[value.astype(jnp.float32) for value in half])
    np.testing.assert_array_equal(mean, exact)


def test_one_step_index_an_image_equals_one_image_at_a_time():
    schedule = make_schedule(scheduler(), 10, eta=1.0)
    x, output, z = (jnp.asarray(latents(seed)) for seed in range(3))
    index = jnp.array([7, 0, 9])
    means, stds = step_distribution(schedule, index, x, output)
    log_probs = gaussian_log_prob(z, means, stds, reduction="sum")
    for b, i in enumerate([7, 0, 9]):
        one = slice(b, b + 1)
        mean, std = step_distribution(schedule, i, x[one], output[one])
        np.testing.assert_allclose(means[one], mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(stds[b], std, rtol=1e-6)
        want = gaussian_log_prob(z[one], mean, std, reduction="sum")
        np.testing.assert_allclose(log_probs[one], want, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_equals_the_quadrature_of_two_normals(reduction):
    p, q, std = latents(0), latents(1), 0.7
    grid = np.linspace(-12, 12, 20001)
    density = norm.pdf(grid, p[..., None].astype(np.float64), std)
    log_ratio = norm.logpdf(grid, p[..., None].astype(np.float64), std)
    log_ratio = log_ratio - norm.logpdf(grid, q[..., None].astype(np.float64), std)
    want = getattr(np.trapezoid(density * log_ratio, grid), reduction)(axis=(1, 2, 3))
    got = gaussian_kl(jnp.asarray(p), jnp.asarray(q), std, reduction=reduction)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("function", [gaussian_log_prob, gaussian_kl])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_deterministic_step_has_no_density_and_no_gradient(function, reduction):
    x, mean = jnp.asarray(latents(0)), jnp.asarray(latents(1))
    std = jnp.array([0.0, 0.5, 0.0])

    def total(x, mean, std):
        return function(x, mean, std, reduction=reduction).sum()

    values = function(x, mean, std, reduction=reduction)
    assert values[0] == values[2] == 0
    assert values[1] != 0
    for gradient in jax.grad(total, argnums=(0, 1, 2))(x, mean, std):
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[[0, 2]].any()
        assert np.asarray(gradient)[1].any()


def test_sensitivity_over_ten_steps():
    schedule = make_schedule(scheduler(), 10, eta=1.0)
    expected = [0.10, 0.15, 0.22, 0.31, 0.40, 0.51, 0.64, 0.82, 1.16, 11.0]
    np.testing.assert_allclose(step_sensitivity(schedule), expected, atol=0.05)


def test_a_step_without_noise_has_no_sensitivity():
    schedule = make_schedule(scheduler(), 4, eta=1.0, stochastic_steps=[True, False, True, False])
    assert (np.asarray(step_sensitivity(schedule)) > 0).tolist() == [True, False, True, False]
    assert not np.asarray(step_sensitivity(schedule))[[1, 3]].any()


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_schedule(scheduler(), 2, eta=1.0).std = jnp.zeros(2)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sensitivity_equals_a_finite_difference(prediction):
    options = scheduler(prediction_type=prediction)
    sensitivity = step_sensitivity(make_schedule(options, 10, eta=0.7))
    for i in range(9):
        low, sigma = derive(options, 10, i, 0.7, np.array([0.4]), np.array([0.2]))
        high, _ = derive(options, 10, i, 0.7, np.array([0.4]), np.array([0.3]))
        np.testing.assert_allclose(sensitivity[i], np.abs(high - low)[0] / 0.1 / sigma, rtol=2e-5)


def test_uniform_weights_are_one_on_stochastic_steps():
    mask = [False, True, True, False, True]
    schedule = make_schedule(scheduler(), 5, eta=1.0, stochastic_steps=mask)
    np.testing.assert_array_equal(step_weights(schedule, "uniform"), np.asarray(mask, np.float32))


def test_gain_weights_level_the_steps_and_drop_the_last_stochastic_one():
    mask = [False, True, True, True, False]
    schedule = make_schedule(scheduler(), 5, eta=1.0, stochastic_steps=mask)
    weights = np.asarray(step_weights(schedule, "gain"))
    sensitivity = np.asarray(step_sensitivity(schedule))
    assert weights[[0, 3, 4]].tolist() == [0, 0, 0]
    mean = sensitivity[1:3].mean()
    np.testing.assert_allclose(weights[1:3] * sensitivity[1:3], [mean, mean], rtol=1e-6)
    np.testing.assert_allclose(weights, jax.jit(step_weights, static_argnums=1)(schedule, "gain"))


def test_gain_weights_need_two_stochastic_steps():
    schedule = make_schedule(scheduler(), 3, eta=1.0, stochastic_steps=[False, True, False])
    with pytest.raises(UsageError, match="gain"):
        step_weights(schedule, "gain")


def test_steps_outside_the_window_are_those_of_a_deterministic_schedule():
    mask = [True, False, True, False]
    mixed = make_schedule(scheduler(), 4, eta=1.0, stochastic_steps=mask)
    for i, stochastic in enumerate(mask):
        pure = make_schedule(scheduler(), 4, eta=1.0 if stochastic else 0.0)
        x, output = jnp.asarray(latents(0)), jnp.asarray(latents(1))
        for ours, theirs in zip(
            step_distribution(mixed, i, x, output),
            step_distribution(pure, i, x, output),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_last_step_is_deterministic_exactly_where_alpha_is_set_to_one():
    assert make_schedule(scheduler(set_alpha_to_one=True), 10, eta=1.0).stochastic.tolist() == (
        [True] * 9 + [False]
    )
    assert make_schedule(scheduler(), 10, eta=1.0).stochastic.all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_finite(prediction):
    options = scheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    schedule = make_schedule(options, 10, eta=1.0)
    assert schedule.signal_scale[0] == 0
    for leaf in jax.tree.leaves(schedule):
        assert np.isfinite(leaf).all()
    x, output = jnp.asarray(latents(0)), jnp.asarray(latents(1))
    assert np.isfinite(step_distribution(schedule, 0, x, output)[0]).all()


@pytest.mark.parametrize("num_steps", [61, 103, 499, 999])
def test_trailing_spacing_never_has_a_step_too_many(num_steps):
    timesteps = spaced_timesteps(scheduler(), num_steps)
    assert len(timesteps) == num_steps
    assert timesteps.min() >= 0
    assert (np.diff(timesteps) < 0).all()


def test_schedule_is_a_pytree_and_jit_reuses_its_program_for_another_window():
    traces = []

    @jax.jit
    def first_std(schedule):
        traces.append(1)
        return schedule.std[0]

    for first in (True, False):
        schedule = make_schedule(scheduler(), 3, eta=1.0, stochastic_steps=[first, True, True])
        assert (first_std(schedule) > 0) == first
    assert len(traces) == 1
    shapes = jax.eval_shape(lambda schedule: schedule, schedule)
    assert shapes.num_steps == 3
    assert jax.tree.map(lambda leaf: "leaf", schedule).timesteps == "leaf"


STABLE_DIFFUSION_1 = """{
  "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
  "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
  "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
  "clip_sample": false
}"""
STABLE_DIFFUSION_XL = """{
  "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
  "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
  "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
  "sample_max_value": 1.0, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
  "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": false
}"""


@pytest.mark.parametrize("text", [STABLE_DIFFUSION_1, STABLE_DIFFUSION_XL])
def test_published_configs_are_read(text):
    read = SchedulerConfig.from_dict(json.loads(text))
    assert (read.steps_offset, read.set_alpha_to_one, read.clip_sample) == (1, False, False)
    assert (read.beta_start, read.beta_end, read.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert read.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta_strat": 0.1}, "beta_strat.*beta_start"),
        ({"beta_schedule": "scaled_liner"}, "scaled_liner.*scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"timestep_spacing": "even"}, "even"),
        ({"thresholding": True}, "thresholding"),
        ({"variance_type": "learned_range"}, "variance_type.*learned_range"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps.*int"),
        ({"num_train_timesteps": True}, "num_train_timesteps.*int"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"default_spacing": True}, "Unknown field 'default_spacing'"),
        ({"solver_options": {}}, "Unknown field 'solver_options'"),
        ({"clip_sample_range": 0}, "clip_sample_range"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"trained_betas": [0.1, 2], "num_train_timesteps": 2}, "trained_betas"),
        ({"trained_betas": "none"}, "trained_betas"),
    ],
)
def test_an_unusable_config_names_the_field(wrong, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        SchedulerConfig.from_dict(wrong)


def test_a_spacing_left_to_the_samplers_is_the_same_noise_schedule():
    left, named = (SchedulerConfig.from_dict(d) for d in ({}, {"timestep_spacing": "leading"}))
    assert left == named
    assert (left.solver_spacing, named.solver_spacing) == ("linspace", "leading")
    with pytest.raises(UsageError, match="expected default_spacing=False"):
        dataclasses.replace(left, timestep_spacing="trailing")


def test_options_of_other_solvers_are_kept_and_are_no_part_of_the_noise_schedule():
    plain = SchedulerConfig.from_dict({})
    karras = SchedulerConfig.from_dict({"use_karras_sigmas": True, "solver_order": 3})
    assert (plain.solver_options, plain.use_karras_sigmas) == ({}, False)
    assert karras.solver_options == {"use_karras_sigmas": True, "solver_order": 3}
    assert karras.use_karras_sigmas
    assert karras == plain
    assert hash(karras) == hash(plain)
    read = SchedulerConfig.from_dict(json.loads(json.dumps(karras.to_dict())))
    assert read.solver_options == karras.solver_options
    assert plain.to_dict().keys() & karras.solver_options == set()
    for ours, theirs in zip(
        *(jax.tree.leaves(make_schedule(config, 10, eta=1.0)) for config in (karras, plain)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UsageError, match="solver_options has 'use_karras' .*'use_karras_sigmas'"):
        SchedulerConfig(solver_options={"use_karras": True})


@pytest.mark.parametrize(
    ("options", "num_steps", "arguments", "message"),
    [
        ({}, 0, {"eta": 1.0}, "0.*1000"),
        ({}, 1001, {"eta": 1.0}, "1001.*1000"),
        ({}, 10, {"eta": -0.1}, "eta is -0.1"),
        ({}, 10, {"eta": float("nan")}, "eta is nan"),
        ({}, 10, {"eta": 3.0}, "at most"),
        ({}, 10, {"eta": 1.0, "stochastic_steps": [True] * 9}, "9 entries"),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 1000, {"eta": 0.0}, "steps_offset"),
        ({"beta_start": 1e-12, "beta_end": 1e-12}, 10, {"eta": 0.0}, "no noise at all"),
        (
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
            10,
            {"eta": 0.0},
            "epsilon",
        ),
    ],
)
def test_an_impossible_schedule_is_refused(options, num_steps, arguments, message):
    with pytest.raises(UsageError, match=message):
        make_schedule(scheduler(**options), num_steps, **arguments)


@pytest.mark.parametrize("noisy", [range(10), range(3, 7)])
def test_the_largest_eta_named_in_the_refusal_is_accepted(noisy):
    mask = [step in noisy for step in range(10)]
    with pytest.raises(UsageError) as refusal:
        make_schedule(scheduler(), 10, eta=5.0, stochastic_steps=mask)
    limit = float(str(refusal.value).split()[-1].rstrip("."))
    assert limit > 1
    make_schedule(scheduler(), 10, eta=limit * 0.999, stochastic_steps=mask)
    with pytest.raises(UsageError):
        make_schedule(scheduler(), 10, eta=limit * 1.001, stochastic_steps=mask)


def test_at_the_largest_eta_rounding_leaves_no_direction_without_a_number():
    table, below = alphas_cumprod(scheduler()), 0
    for num_steps in (2, 3, 4, 5, 8, 10, 20, 25, 40, 50):
        t = spaced_timesteps(scheduler(), num_steps)
        previous = t - 1000 // num_steps
        a, s = table[t], np.where(previous >= 0, table[np.maximum(previous, 0)], table[0])
        unit = (1 - s) / (1 - a) * (1 - a / s)
        eta = np.sqrt(np.min((1 - s) / unit))  # where nothing is left beside the noise
        below += np.min(1 - s - eta**2 * unit) < 0
        schedule = make_schedule(scheduler(), num_steps, eta=float(eta))
        assert np.isfinite(schedule.direction_scale).all()
    assert below  # some remainder was rounded to less than nothing
