"""The accumulated update against the loss written in one piece and differentiated by autodiff."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compilations
from scipy.stats import norm as scipy_norm
from tiny_policy import (
    CONDITION,
    PARAMS,
    REFERENCE,
    SCHEDULE,
    SCHEDULER,
    SHAPE,
    SIZE,
    B,
    T,
    batch_for,
    moved,
    noise,
    plan_for,
    policy,
)
from whole_loss import whole_loss

from diffusion_grpo.loss import LossConfig, Shares, compile_loss
from diffusion_grpo.optim import TrainState, make_update
from diffusion_grpo.rollout import Trajectory
from diffusion_grpo.schedule import flow_step_sizes, make_schedule, step_distribution
from diffusion_grpo.steps import plan_steps
from diffusion_grpo.trajectories import UpdateBatch, policy_steps, trajectory_kl
from diffusion_grpo.update import make_gradient


@functools.cache
def compiled(config):
    learned = (noise,) if config.learned_noise else ()
    return make_gradient(compile_loss(policy, config, *learned))


def gradient(params, config, plan, *, batch=None, beta=0.5, on_policy=False):
    batch = batch_for(config.reduction, config.learned_noise) if batch is None else batch
    arguments = params, None, SCHEDULE, batch, plan, jnp.float32(beta)
    return compiled(config)(*arguments, on_policy=on_policy)


def assert_close(ours, expected, tolerance=2e-4):
    largest = max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * max(float(np.abs(b).max()), 1e-3 * largest)


def check(config, params=None, *, batch=None, beta=0.5, tolerance=2e-4, **options):
    """Compare gradient and loss, and return the metrics."""
    params = moved(PARAMS) if params is None else params
    batch = batch_for(config.reduction, config.learned_noise) if batch is None else batch
    plan = plan_for(config, **options)
    ours, metrics = gradient(params, config, plan, batch=batch, beta=beta)
    value, expected = jax.value_and_grad(whole_loss)(params, config, plan, beta, batch)
    assert_close(ours, expected, tolerance)
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-4, atol=2e-6)
    return metrics


@pytest.mark.parametrize("microbatch", [1, 2, 6])
def test_trajectory_ratio_gradient_equals_autodiff_of_the_whole_loss(microbatch):
    check(LossConfig(kl="exact", microbatch=microbatch))


@pytest.mark.parametrize("base", ["old", "reference"])
@pytest.mark.parametrize("ratio", ["trajectory", "step"])
def test_ratio_against_the_old_policy_and_against_the_reference(ratio, base):
    config = LossConfig(ratio=ratio, ratio_base=base, microbatch=3)
    params = moved(PARAMS, 0.005)
    metrics = check(config, params, clip=0.02)
    assert 0 < float(metrics["clip_fraction"]) < 1
    # the KL to the old policy is measured against the old one, whatever the ratio's base
    other = LossConfig(ratio=ratio, microbatch=3)
    _, same = gradient(params, other, plan_for(other))
    np.testing.assert_allclose(metrics["approx_kl"], same["approx_kl"], rtol=1e-3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "flow_grpo"])
def test_every_kl_in_the_loss_equals_autodiff(kind):
    check(LossConfig(kl=kind, microbatch=3))


@pytest.mark.parametrize("kind", ["k3", "exact"])
def test_every_kl_goes_with_the_step_ratio(kind):
    check(LossConfig(ratio="step", kl=kind, microbatch=6))


@pytest.mark.parametrize(
    "options", [{"weights": "gain"}, {"weights": "given", "given": (0.5, 0.0, 2.0, 1.0)}]
)
@pytest.mark.parametrize("ratio", ["trajectory", "step"])
def test_step_weights_enter_the_loss(ratio, options):
    config = LossConfig(ratio=ratio, microbatch=3)
    assert len(plan_for(config, **options).active) == T - 1
    check(config, **options)


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(kl="exact", microbatch=3),
        LossConfig(kl="k3", microbatch=3),
        LossConfig(ratio="step", kl="k3", microbatch=3),
        LossConfig(ratio_base="reference", microbatch=3),
    ],
)
def test_step_weights_are_of_the_ratio_whatever_its_base_and_not_of_the_kl(config):
    check(config, weights="given", given=(0.5, 0.0, 2.0, 1.0))


@pytest.mark.parametrize("ratio", ["trajectory", "step"])
def test_sum_over_the_latent_is_the_density_itself(ratio):
    config = LossConfig(ratio=ratio, reduction="sum", kl="exact", microbatch=3)
    check(config, moved(PARAMS, 0.003), tolerance=2e-3)


def test_a_fraction_of_the_steps_is_the_loss_of_those_alone():
    config = LossConfig(kl="k2", microbatch=3)
    plan = plan_for(config, fraction=0.5)
    assert len(plan.active) == len(plan.steps) == 2
    check(config, fraction=0.5)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LossConfig(ratio="step", guard=True, microbatch=3), {}),
        (LossConfig(ratio="step", guard=True, ratio_base="reference", microbatch=3), {}),
        (LossConfig(ratio="step", dppo_kl=1e-3, microbatch=3), {}),
        (LossConfig(ratio="step", dppo_kl=1e-3, ratio_base="reference", microbatch=3), {}),
        (LossConfig(ratio="step", microbatch=3), {"gamma": 0.8}),
        (LossConfig(ratio="step", dppo_kl=1e-3, microbatch=3), {"gamma": 0.8}),
    ],
)
def test_corrections_equal_autodiff_and_differ_from_the_plain_loss(config, options):
    metrics = check(config, clip=0.02, **options)
    plain = LossConfig(ratio=config.ratio, ratio_base=config.ratio_base, microbatch=3)
    _, other = gradient(moved(PARAMS), plain, plan_for(plain, clip=0.02))
    assert float(metrics["policy_loss"]) != pytest.approx(float(other["policy_loss"]), rel=1e-3)


@pytest.mark.parametrize("correction", [{"guard": True}, {"dppo_kl": 0.03}])
def test_corrections_of_the_density_itself_equal_autodiff(correction):
    config = LossConfig(ratio="step", reduction="sum", microbatch=3, **correction)
    metrics = check(config, moved(PARAMS, 0.003), clip=0.02, tolerance=2e-3)
    assert 0 < float(metrics["clip_fraction"]) < 1


@pytest.mark.parametrize("ratio", ["trajectory", "step"])
def test_each_bound_of_the_clip_range_is_its_own(ratio):
    config, batch = LossConfig(ratio=ratio, microbatch=3), batch_for()
    # Ratios of about 1.22, and of 0.82: past the narrow bound if they were on its side.
    for shift, low, high in ((-0.2, 0.05, 0.5), (0.2, 0.5, 0.05)):
        log_probs = batch.trajectory.log_probs.at[0].add(shift)
        moved_on = batch._replace(trajectory=batch.trajectory._replace(log_probs=log_probs))
        metrics = check(config, moved(PARAMS, 0.003), batch=moved_on, clip=low, clip_high=high)
        assert float(metrics["clip_fraction"]) == 0
        assert abs(float(metrics["ratio/mean"]) - 1) > 0.03


@pytest.mark.parametrize("ratio", ["trajectory", "step"])
def test_dual_clip_equals_autodiff_and_differs_from_the_plain_loss(ratio):
    # Ratios far above 1, which are what it is for: the old policy found the draws less likely.
    config, batch = LossConfig(ratio=ratio, microbatch=3), batch_for()
    trajectory = batch.trajectory._replace(log_probs=batch.trajectory.log_probs - 0.3)
    batch = batch._replace(trajectory=trajectory)
    metrics = check(config, batch=batch, dual_clip=1.04)
    _, other = gradient(moved(PARAMS), config, plan_for(config), batch=batch)
    assert float(metrics["policy_loss"]) < float(other["policy_loss"]) - 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_learned_noise_has_entropy_and_kl_of_its_own(reduction):
    config = LossConfig(
        reduction=reduction, kl="exact", entropy_coeff=0.1, learned_noise=True, microbatch=3
    )
    # log_scale moves too: its gradient is of the ratio, of the KL and of the entropy
    check(config, moved(PARAMS, 0.01), tolerance=2e-3)
    idle = batch_for(reduction, True)._replace(advantages=jnp.zeros(B))
    none, _ = gradient(PARAMS, config, plan_for(config), batch=idle, beta=0.0, on_policy=True)
    slope = -0.1 * (SIZE if reduction == "sum" else 1)
    np.testing.assert_allclose(none["log_scale"], np.full(T, slope), rtol=1e-5)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none["network"]))


def test_entropy_is_that_of_the_steps():
    _, metrics = gradient(PARAMS, LossConfig(microbatch=3), plan_for(LossConfig()))
    want = sum(0.5 * np.log(2 * np.pi * np.e * float(std) ** 2) for std in SCHEDULE.std)
    np.testing.assert_allclose(metrics["entropy"], want, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(kl="exact", microbatch=2),
        LossConfig(kl="k3", ratio_base="reference", microbatch=2),
    ],
)
def test_first_update_needs_no_sweep_and_gives_the_same_gradient(config):
    plan = plan_for(config, clip=0.9)
    short, metrics = gradient(PARAMS, config, plan, on_policy=True)
    swept, swept_metrics = gradient(PARAMS, config, plan)
    assert_close(short, swept, 1e-5)
    assert float(metrics.pop("ratio/drift")) < 1e-6 and "ratio/drift" not in swept_metrics
    batch = batch_for(config.reduction, config.learned_noise)
    recorded = batch.trajectory.log_probs.at[1, 2].add(0.25)
    batch = batch._replace(trajectory=batch.trajectory._replace(log_probs=recorded))
    drift = gradient(PARAMS, config, plan, batch=batch, on_policy=True)[1]["ratio/drift"]
    np.testing.assert_allclose(drift, 0.25, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], swept_metrics[name], rtol=1e-5, atol=1e-6)
    if config.ratio_base == "old":
        assert float(metrics["ratio/min"]) == float(metrics["ratio/max"]) == 1.0


def test_first_update_runs_the_network_once_a_step_and_later_ones_twice():
    calls = []

    def counted(params, frozen):
        inner = policy(params, frozen)

        def denoise(x, t, condition):
            jax.debug.callback(lambda: calls.append(1))
            return inner(x, t, condition)

        return denoise

    config = LossConfig(microbatch=3)
    run = make_gradient(compile_loss(counted, config))
    for on_policy, passes in ((True, 1), (False, 2)):
        calls.clear()
        arguments = PARAMS, None, SCHEDULE, batch_for(), plan_for(config), jnp.float32(0)
        jax.block_until_ready(run(*arguments, on_policy=on_policy))
        jax.effects_barrier()
        assert len(calls) == passes * T * (B // 3)


def test_clipped_images_have_no_gradient():
    config = LossConfig(microbatch=6)
    metrics = check(config, clip=1e-6, beta=0.0)
    # every ratio is outside of the range; half of them, roughly, on the side where clipping acts
    assert 0.0 < float(metrics["clip_fraction"]) < 1.0
    assert float(check(config, clip=0.99)["clip_fraction"]) == 0.0


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(kl="exact", microbatch=3),
        LossConfig(kl="k3", microbatch=3),
        LossConfig(ratio="step", kl="flow_grpo", microbatch=3),
        LossConfig(ratio_base="reference", entropy_coeff=0.1, learned_noise=True, microbatch=3),
    ],
)
def test_a_few_steps_are_an_unbiased_estimate(config):
    """The mean over all C(4, 2) subsets equals the full gradient, and that of the metrics too."""
    params, plan = moved(PARAMS), plan_for(config)
    full, metrics = gradient(params, config, plan)
    subsets = list(itertools.combinations(range(T), 2))
    parts = [gradient(params, config, plan._replace(steps=jnp.asarray(s))) for s in subsets]
    mean, found = jax.tree.map(lambda *x: sum(x) / len(subsets), *parts)
    assert_close(mean, full)
    for name in metrics.keys() - {"ratio/min", "ratio/max"}:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["exact", "k1", "k2", "k3", "flow_grpo"])
def test_kl_gradient_reaches_the_policy_and_never_the_reference(kind):
    config = LossConfig(kl=kind, microbatch=6)
    idle = batch_for()._replace(advantages=jnp.zeros(B))
    ours, metrics = gradient(PARAMS, config, plan_for(config), batch=idle, on_policy=True)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(ours["network"])) > 0
    assert float(metrics["kl"]) != 0

    # A reference that is computed from the same parameters: the whole loss, differentiated through
    # it, has another gradient; ours must be the one that treats it as a constant.
    def through(params, stop):
        held = jax.lax.stop_gradient(params) if stop else params
        reference = policy_steps(
            policy(held, None), SCHEDULE, idle.trajectory.latents + 0.1, CONDITION, jnp.arange(T),
            reduction="mean",
        )  # fmt: skip
        return whole_loss(params, config, plan_for(config), 0.5, idle._replace(reference=reference))

    constant, moving = (jax.grad(through)(PARAMS, stop) for stop in (True, False))
    reference = policy_steps(
        policy(PARAMS, None), SCHEDULE, idle.trajectory.latents + 0.1, CONDITION, jnp.arange(T),
        reduction="mean",
    )  # fmt: skip
    ours, _ = gradient(
        PARAMS, config, plan_for(config), batch=idle._replace(reference=reference), on_policy=True
    )
    assert_close(ours, constant, 1e-3)
    with pytest.raises(AssertionError):
        assert_close(ours, moving, 1e-3)


@pytest.mark.parametrize("kind", ["exact", "k1", "k2", "k3", "flow_grpo"])
def test_kl_of_each_image_equals_that_of_the_loss(kind):
    config = LossConfig(kl=kind, microbatch=6)
    batch = batch_for()
    each = jax.jit(
        lambda: trajectory_kl(
            policy(PARAMS, None), SCHEDULE, policy(REFERENCE, None), SCHEDULE, batch.trajectory,
            CONDITION, jnp.arange(T), kind=kind, reduction="mean",
        )
    )()  # fmt: skip
    _, metrics = gradient(PARAMS, config, plan_for(config), on_policy=True)
    np.testing.assert_allclose(each.mean(), metrics["kl"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["exact", "k1", "k2", "k3", "flow_grpo"])
def test_kl_of_each_image_is_of_the_steps_that_count_with_the_noise_of_each_policy(kind):
    batch, active = batch_for(learned_noise=True), [0, 2]
    noisy = noise(PARAMS, SCHEDULE)
    each = jax.jit(
        lambda: trajectory_kl(
            policy(PARAMS, None), noisy, policy(REFERENCE, None), SCHEDULE, batch.trajectory,
            CONDITION, jnp.asarray(active), kind=kind, reduction="mean", learned_noise=True,
        )
    )()  # fmt: skip
    exact, flow, delta = np.zeros(B), np.zeros(B), np.zeros(B)
    for i in active:
        x_t, x_s = batch.trajectory.latents[i], np.asarray(batch.trajectory.latents[i + 1])
        (p, own), (q, std) = (
            [
                np.asarray(value, np.float64)
                for value in step_distribution(
                    schedule, i, x_t, policy(one, None)(x_t, SCHEDULE.timesteps[i], CONDITION)
                )
            ]
            for one, schedule in ((PARAMS, noisy), (REFERENCE, SCHEDULE))
        )
        gap, dt = np.square(p - q).mean((1, 2, 3)), float(flow_step_sizes(SCHEDULE)[i])
        exact += np.log(std / own) + (own**2 + gap) / (2 * std**2) - 0.5
        flow += dt * gap / (2 * std**2) / len(active)
        log_ratio = scipy_norm.logpdf(x_s, p, own) - scipy_norm.logpdf(x_s, q, std)
        delta += log_ratio.mean((1, 2, 3))
    want = {
        "exact": exact,
        "flow_grpo": flow,
        "k1": delta,
        "k2": SIZE * delta**2 / 2,
        "k3": SIZE * (np.exp(-delta) - 1 + delta),
    }[kind]
    np.testing.assert_allclose(each, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_estimators_agree_with_the_exact_kl_over_many_draws(kind, reduction):
    # One step from one x_t: over its draws each averages to the KL of the two Gaussians, an
    # element's where log-probs are means.
    n, i = 20_000, 1
    x_t = jnp.broadcast_to(batch_for().trajectory.latents[i, :1], (1, *SHAPE))
    condition, other = CONDITION[:1], moved(PARAMS, 0.03)
    means = [
        step_distribution(SCHEDULE, i, x_t, policy(p, None)(x_t, SCHEDULE.timesteps[i], condition))
        for p in (PARAMS, other)
    ]
    (p, std), (q, _) = means
    x = p + std * jax.random.normal(jax.random.key(0), (n, *SHAPE))
    reduce = np.mean if reduction == "mean" else np.sum
    log_prob = reduce(scipy_norm.logpdf(np.asarray(x), np.asarray(p), float(std)), axis=(1, 2, 3))
    latents = jnp.zeros((T + 1, n, *SHAPE)).at[i].set(x_t[0]).at[i + 1].set(x)
    found = trajectory_kl(
        policy(PARAMS, None),
        SCHEDULE,
        policy(other, None),
        SCHEDULE,
        Trajectory(latents, SCHEDULE.timesteps, jnp.zeros((T, n)).at[i].set(log_prob)),
        jnp.broadcast_to(condition, (n, 8)),
        jnp.asarray([i]),
        kind=kind,
        reduction=reduction,
    )
    exact = float(jnp.square(p - q).sum() / (2 * std**2))
    assert 1e-3 < exact < 0.1  # k2 and k3 of a mean are off by about half of it, relatively
    per = SIZE if reduction == "mean" else 1
    spread = {"k1": np.sqrt(2 * exact / n)}.get(kind, 4 * exact / np.sqrt(n))
    bias = 0.0 if kind == "k1" else 0.75 * exact**2
    assert abs(per * float(found.mean()) - exact) < 5 * spread + bias


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_approx_kl_is_about_the_exact_kl_to_the_old_policy(reduction):
    # With weights that are not 1: the KL is that of the policies, not of the weighted ratio.
    config = LossConfig(reduction=reduction, microbatch=3)
    params, batch = moved(PARAMS, 0.003), batch_for(reduction)
    plan = plan_for(config, weights="given", given=(0.2, 0.5, 2.0, 0.3), clip=0.9)
    _, metrics = gradient(params, config, plan, batch=batch)
    exact = 0.0
    for i in range(T):
        x_t = batch.trajectory.latents[i]
        (p, std), (q, _) = (
            step_distribution(
                SCHEDULE, i, x_t, policy(one, None)(x_t, SCHEDULE.timesteps[i], CONDITION)
            )
            for one in (params, PARAMS)
        )
        exact += float(jnp.square(p - q).sum((1, 2, 3)).mean() / (2 * std**2))
    per = SIZE if reduction == "mean" else 1
    assert exact > 0.05
    # six draws of a quantity that spreads as widely as it is large
    assert exact / 4 < per * float(metrics["approx_kl"]) < 4 * exact


def test_update_improves_the_surrogate_and_counts_nothing_as_skipped():
    config = LossConfig(microbatch=3)
    optimizer = optax.adam(1e-3)
    update = make_update(compiled(config), optimizer)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = TrainState(params, optimizer.init(params), None, jnp.int32(0))
    arguments = None, SCHEDULE, batch_for(), plan_for(config, clip=0.2), jnp.float32(0)
    state, first = update(state, *arguments, on_policy=True)
    state, second = update(state, *arguments, on_policy=False)
    assert float(second["policy_loss"]) < float(first["policy_loss"])
    assert float(first["skipped"]) == float(second["skipped"]) == 0.0
    assert float(second["approx_kl"]) > 0


def test_a_gradient_that_is_not_finite_leaves_the_state():
    optimizer = optax.adam(lambda update: 1e-3 / (1 + update))
    config = LossConfig(microbatch=3)
    update = make_update(compiled(config), optimizer, ema_decay=0.9)
    params = jax.tree.map(jnp.copy, PARAMS)
    average = jax.tree.map(jnp.copy, PARAMS)
    state = TrainState(params, optimizer.init(params), average, jnp.int32(0))
    bad = batch_for()._replace(advantages=batch_for().advantages.at[0].set(jnp.nan))
    arguments = None, SCHEDULE, bad, plan_for(config), jnp.float32(0)
    state, metrics = update(state, *arguments, on_policy=True)
    assert float(metrics["skipped"]) == 1.0
    for kept in (state.params, state.average):
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(PARAMS), strict=True):
            assert (a == b).all()
    moments, rate = state.opt_state
    assert int(moments.count) == 0 and int(rate.count) == 1  # the rate is the iteration's


def test_memory_grows_neither_with_the_steps_nor_with_the_microbatches():
    """By the compiled programs' own analysis; the recorded latents are an input."""
    config = LossConfig(kl="exact", microbatch=3)
    loss = compile_loss(policy, config)
    temporary = {}
    for steps in (4, 32):
        schedule = make_schedule(SCHEDULER, steps, eta=1.0)
        latents = jnp.zeros((steps + 1, 3, *SHAPE))
        trajectory = Trajectory(latents, schedule.timesteps, jnp.zeros((steps, 3)))
        reference = batch_for().reference._replace(means=latents[:-1], log_probs=None)
        mb = UpdateBatch(trajectory, CONDITION[:3], jnp.ones(3), reference)
        plan = plan_steps(schedule, latent_size=SIZE, clip_low=0.1, clip_high=0.1)
        common = PARAMS, None, schedule, mb, plan, jnp.float32(1)
        pulls, _ = loss.terms(*common, on_policy=False)
        shares = Shares(jnp.float32(1), jnp.float32(1))
        programs = (
            loss.terms.lower(*common, on_policy=False),
            loss.accumulate.lower(PARAMS, *common, jnp.int32(0), pulls, shares),
        )
        analyses = [program.compile().memory_analysis() for program in programs]
        temporary[steps] = [analysis.temp_size_in_bytes for analysis in analyses]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
        assert analyses[1].alias_size_in_bytes >= size  # the gradient is summed in place
    assert temporary[4] == temporary[32]

    run = make_gradient(loss)
    for count, programs in ((3, 1), (6, 0)):  # the same whatever the number of microbatches
        batch = batch_for().take(slice(0, count))
        arguments = PARAMS, None, SCHEDULE, batch, plan_for(config), jnp.float32(1)
        with compilations() as compiled:
            run(*arguments, on_policy=False)
        assert compiled.count("accumulate") == programs, compiled


@pytest.mark.parametrize(
    ("config", "moving", "others"),
    [
        (LossConfig(ratio="trajectory"), 2, 0),
        (LossConfig(ratio="step"), 0, 0),
        (LossConfig(ratio="step", kl="exact"), 0, 1),
        (LossConfig(ratio="step", kl="k3"), 2, 1),
        (LossConfig(ratio="trajectory", kl="k1", ratio_base="reference"), 2, 1),
        (LossConfig(ratio="step", guard=True, kl="flow_grpo"), 0, 2),
        (LossConfig(ratio="step", dppo_kl=0.1, ratio_base="reference"), 0, 1),
    ],
)
def test_sweeps_are_of_a_policy_that_moved_and_of_those_it_is_compared_to(config, moving, others):
    assert config.sweeps(3) == (moving, others)
    assert config.sweeps(1) == (0, others)
