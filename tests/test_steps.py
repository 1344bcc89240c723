"""Windows, weights, random steps, and the clip range that a choice of them comes to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2_contingency, norm

from diffusion_grpo.errors import UsageError
from diffusion_grpo.grpo import guarded_log_ratio
from diffusion_grpo.prompt_types import Prompt
from diffusion_grpo.prompts import prompt_batch
from diffusion_grpo.schedule import (
    SchedulerConfig,
    alphas_cumprod,
    flow_step_sizes,
    make_schedule,
    scaled_noise,
    step_sensitivity,
)
from diffusion_grpo.steps import (
    active_steps,
    choose_steps,
    clip_scale,
    fraction_of,
    noise_window,
    plan_steps,
    step_weights,
    update_draw,
)


def scheduler(**fields):
    return SchedulerConfig(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "set_alpha_to_one": False,
            "clip_sample": False,
            **fields,
        }
    )


def schedule(steps=10, *, eta=1.0, **options):
    return make_schedule(scheduler(), steps, eta=eta, **options)


@pytest.mark.parametrize(("steps", "size"), [(10, 1), (10, 3), (8, 4), (5, 5), (25, 4)])
@pytest.mark.parametrize("last_has_noise", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_a_moving_window_is_never_empty_and_covers_every_step_with_noise(
    steps, size, last_has_noise, every
):
    whole = make_schedule(scheduler(set_alpha_to_one=not last_has_noise), steps, eta=1.0)
    noisy = np.asarray(whole.stochastic)
    assert noisy.sum() == steps - (not last_has_noise)
    if size > noisy.sum():
        with pytest.raises(UsageError, match="only 4 of the 5 steps have noise"):
            noise_window(whole, size)
        return
    rounds = (noisy.sum() - size + 1) * every
    windows = [noise_window(whole, size, every=every, iteration=i) for i in range(rounds)]
    for window in windows:
        assert sum(window) == size  # as many as asked for, each of which has noise
        assert not (np.array(window) & ~noisy).any()
        first = window.index(True)
        assert all(window[first : first + size])
    covered = np.array(windows).sum(axis=0)
    assert ((covered > 0) == noisy).all()
    assert windows[0] == windows[every - 1]
    again = noise_window(whole, size, every=every, iteration=int(rounds))
    assert again == windows[0]


def test_a_window_that_stays_begins_where_it_is_put():
    assert noise_window(schedule(5), 2, start=1, iteration=9) == [False, True, True, False, False]
    moving = [noise_window(schedule(5), 2, start=2, every=1, iteration=i) for i in range(4)]
    assert [window.index(True) for window in moving] == [2, 3, 0, 1]
    with pytest.raises(UsageError, match="window of 3 steps from step 3"):
        noise_window(schedule(5), 3, start=3)


def test_given_weights_count_on_steps_with_noise_only():
    window = schedule(4, stochastic_steps=[True, True, False, False])
    assert step_weights(window, "given", (0.5, 0.0, 2.0, 1.0)).tolist() == [0.5, 0, 0, 0]
    with pytest.raises(UsageError, match="0 on every step with noise"):
        step_weights(window, "given", (0.0, 0.0, 2.0, 1.0))
    with pytest.raises(UsageError, match="3 step weights.*4 denoising steps"):
        step_weights(window, "given", (1.0, 1.0, 1.0))


def test_active_steps_have_noise_and_weight():
    window = schedule(5, stochastic_steps=[True, True, True, False, False])
    assert active_steps(window, jnp.ones(5).at[1].set(0)).tolist() == [0, 2]


def test_steps_are_drawn_uniformly_and_without_replacement():
    active = jnp.asarray([0, 2, 3, 7])
    assert choose_steps(active, None, (0, 0, 0)).tolist() == [0, 2, 3, 7]
    assert choose_steps(active, 4, (0, 0, 0)).tolist() == [0, 2, 3, 7]
    draws = [tuple(choose_steps(active, 2, (5, i, 1)).tolist()) for i in range(600)]
    counts = {pair: draws.count(pair) for pair in itertools.combinations([0, 2, 3, 7], 2)}
    assert sum(counts.values()) == 600  # every draw is one of the six pairs, in order
    assert min(counts.values()) > 60 and max(counts.values()) < 140
    assert draws[3] == tuple(choose_steps(active, 2, (5, 3, 1)).tolist())


def test_steps_of_an_update_do_not_depend_on_the_prompt_that_is_drawn():
    weighted = [Prompt("a red circle", weight=1.0), Prompt("a blue square", weight=1.01)]
    active = jnp.arange(10)
    counts = np.zeros((2, 10))
    for iteration in range(2000):
        ((index, _),) = prompt_batch(weighted, seed=3, iteration=iteration, num_prompts=1)
        counts[index, choose_steps(active, 2, update_draw(3, iteration, 0))] += 1
    # Independent: both prompts have each step as often, but for chance.
    assert chi2_contingency(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("count", "fraction", "want"), [(10, 0.6, 6), (3, 1.0, 3), (10, 0.01, 1), (4, 0.4, 2)]
)
def test_a_fraction_is_one_step_at_least(count, fraction, want):
    assert fraction_of(count, fraction) == want


def plan(steps, **options):
    defaults = {"latent_size": 64 * 64 * 4, "clip_low": 1e-4, "clip_high": 1e-4}
    return plan_steps(steps, **{**defaults, **options})


def test_a_fraction_of_the_steps_is_drawn_anew_each_iteration():
    plans = [plan(schedule(), fraction=0.6, draw=(0, i)) for i in range(40)]
    assert all(len(p.active) == 6 and p.active.tolist() == p.steps.tolist() for p in plans)
    assert set(np.concatenate([p.active for p in plans]).tolist()) == set(range(10))
    assert len({tuple(p.active.tolist()) for p in plans}) > 20
    # The sum of six log-ratios spreads √6 times as far as one does.
    np.testing.assert_allclose([p.clip_high for p in plans], 1e-4 * 6**0.5, rtol=1e-3)


def test_steps_of_an_update_do_not_depend_on_which_take_part():
    counts = np.zeros((10, 6))
    for iteration in range(600):
        active = plan(schedule(), fraction=0.6, draw=(0, iteration)).active
        steps = choose_steps(active, 2, update_draw(0, iteration, 0))
        left_out = np.setdiff1d(np.arange(10), active)
        counts[np.ix_(left_out, np.searchsorted(active, steps))] += 1
    # Independent: whichever are left out, each of the others is drawn as often, but for chance.
    assert chi2_contingency(counts).pvalue > 1e-3


@pytest.mark.parametrize("of", ["seed", "iteration", "number"])
def test_each_seed_iteration_and_update_draws_steps_of_its_own(of):
    draws = [update_draw(**({"seed": 3, "iteration": 5, "number": 1} | {of: i})) for i in range(30)]
    assert len({tuple(choose_steps(jnp.arange(10), 3, draw).tolist()) for draw in draws}) > 20


def test_discounts_are_of_all_steps_that_remain_with_noise_or_without():
    window = schedule(4, stochastic_steps=[True, True, False, False])
    np.testing.assert_allclose(plan(window, gamma=0.5).discounts, [0.125, 0.25, 0.5, 1.0])


def test_the_clip_range_is_as_given_for_one_step_of_a_64x64x4_latent():
    for options in ({"ratio": "step"}, {"weights": "given", "given": (0.0,) * 9 + (1.0,)}):
        ours = plan(schedule(), **options)
        np.testing.assert_allclose([ours.clip_low, ours.clip_high], 1e-4, rtol=1e-5)
    same = plan(schedule(), latent_size=7, scale_clip=False)
    np.testing.assert_allclose([same.clip_low, same.clip_high], 1e-4, rtol=1e-5)


def test_the_demo_s_clip_range_is_the_default_for_its_latents_at_any_window():
    from diffusion_grpo.config import PRESETS

    demo = PRESETS["demo"]
    assert demo.rollout.window_size == 8 and demo.grpo.clip_scale == "auto"
    # A mean over 64 times fewer elements spreads 8 times as far, a sum over n steps √n times.
    for size in (3, 8):
        expected = 1e-4 * 8 * size**0.5
        window = noise_window(schedule(demo.rollout.num_steps), size, start=1)
        ours = plan(
            schedule(demo.rollout.num_steps, stochastic_steps=window),
            latent_size=8 * 8 * 4,
            clip_low=demo.grpo.clip_low,
            clip_high=demo.grpo.clip_high,
        )
        np.testing.assert_allclose([ours.clip_low, ours.clip_high], expected, rtol=0.01)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", ["uniform", "gain"])
def test_the_clip_scale_is_how_much_wider_log_ratios_spread(weights, reduction):
    """By simulation: the network's output changes alike at every step and every element."""
    steps, change, n = schedule(), 0.003, 4000
    rng = np.random.default_rng(0)
    moves = change * np.asarray(step_sensitivity(steps), np.float64)  # Δμ/σ

    def log_ratio(size, i, how):
        z = rng.normal(size=(n, size))
        return getattr(norm.logpdf(z, moves[i], 1) - norm.logpdf(z), how)(axis=1)

    w = np.asarray(step_weights(steps, weights), np.float64)
    active = np.flatnonzero(w)
    total = sum(w[i] * log_ratio(100, i, reduction) for i in active)
    # one step of the nominal latent with the steps' root mean square, by the closed form
    nominal = np.sqrt(np.square(moves[active]).mean() / 16384)
    scale = clip_scale(steps, jnp.asarray(w), jnp.asarray(active), 100, ratio="trajectory",
                       reduction=reduction)  # fmt: skip
    np.testing.assert_allclose(total.std() / nominal, scale, rtol=0.04)
    if weights == "uniform":
        np.testing.assert_allclose(
            scale, np.sqrt(16384 / 100 * 10) * (100 if reduction == "sum" else 1), rtol=1e-5
        )


def test_the_clip_scale_of_grpo_guard_is_how_much_wider_its_exponents_spread():
    """By simulation, as above; the exponents of all steps together against one step's log-ratio."""
    steps, change, n = schedule(), 0.003, 4000
    rng = np.random.default_rng(1)
    moves = change * np.asarray(step_sensitivity(steps), np.float64)
    active = np.flatnonzero(np.asarray(steps.std))
    spreads = []
    for i in active:
        z = rng.normal(size=(n, 100))
        log_ratio = (norm.logpdf(z, moves[i], 1) - norm.logpdf(z)).mean(axis=1)
        guarded = guarded_log_ratio(
            jnp.asarray(log_ratio), jnp.asarray(moves[i] ** 2 / 2), steps.std[i]
        )
        spreads.append(np.asarray(guarded).std())
    nominal = np.sqrt(np.square(moves[active]).mean() / 16384)
    scale = clip_scale(steps, jnp.ones(len(moves)), jnp.asarray(active), 100, ratio="step",
                       reduction="mean", guard=True)  # fmt: skip
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(spreads))) / nominal, scale, rtol=0.04)
    ours = plan(steps, latent_size=100, ratio="step", guard=True, clip_high=1e-6)
    np.testing.assert_allclose(ours.clip_high, 1e-6 * scale, rtol=1e-3)


def test_dual_clip_is_scaled_like_the_range_and_stays_above_one():
    assert plan(schedule()).dual_clip is None
    ours = plan(schedule(), latent_size=1024, dual_clip=3.0, ratio="step")
    np.testing.assert_allclose(ours.dual_clip, 3.0**4, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_flow_step_sizes_are_the_time_of_the_straight_path(prediction):
    steps = make_schedule(scheduler(prediction_type=prediction), 8, eta=1.0)
    abar = alphas_cumprod(scheduler())

    def tau(a):
        return np.sqrt(1 - a) / (np.sqrt(a) + np.sqrt(1 - a))

    times = [tau(abar[t]) for t in (999, 874, 749, 624, 499, 374, 249, 124)] + [tau(abar[0])]
    np.testing.assert_allclose(flow_step_sizes(steps), -np.diff(times), rtol=1e-4)
    # the noised latent is on the straight path between clean latent and noise
    a = abar[499]
    x0, e = 1.7, -0.4
    x = (np.sqrt(a) * x0 + np.sqrt(1 - a) * e) / (np.sqrt(a) + np.sqrt(1 - a))
    assert x == pytest.approx((1 - tau(a)) * x0 + tau(a) * e)


def test_scaled_noise_changes_the_noise_and_no_mean():
    window = schedule(3, stochastic_steps=[True, True, False])
    ours = scaled_noise(window, jnp.log(jnp.asarray([2.0, 0.5, 3.0])))
    np.testing.assert_allclose(ours.std, window.std * jnp.asarray([2.0, 0.5, 0.0]), rtol=1e-6)
    for name in ("signal_scale", "direction_scale", "next_signal_scale", "timesteps"):
        assert (getattr(ours, name) == getattr(window, name)).all()
    slope = jax.grad(lambda s: scaled_noise(window, s).std.sum())(jnp.zeros(3))
    np.testing.assert_allclose(slope, window.std, rtol=1e-6)
