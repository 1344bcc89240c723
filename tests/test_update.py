"""The accumulated update against the loss written in one piece and differentiated by autodiff."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.scipy.stats import norm

from diffusion_grpo.rollout import Trajectory, sample
from diffusion_grpo.schedule import SchedulerConfig, make_schedule, step_distribution, step_weights
from diffusion_grpo.update import (
    LossConfig,
    TrainState,
    UpdateBatch,
    make_gradient,
    make_update,
    reference_means,
)

B, T, SHAPE = 6, 5, (4, 4, 2)
SCHEDULER = SchedulerConfig.from_dict(
    {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
)
SCHEDULE = make_schedule(SCHEDULER, T, eta=1.0)


def loss_gradient(policy, config, *arguments, on_policy):
    return make_gradient(policy, config)(*arguments, on_policy=on_policy)


class Network(nnx.Module):
    """A small convolutional policy with a time and a prompt input."""

    def __init__(self, rngs):
        self.inner = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.time = nnx.Linear(1, 8, rngs=rngs)
        self.outer = nnx.Conv(8, 2, (3, 3), rngs=rngs)

    def __call__(self, x, t, condition):
        h = self.inner(x) + self.time(jnp.full((1, 1), t / 1000))[:, None, None]
        return self.outer(jax.nn.silu(h + condition[:, None, None, :]))


GRAPHDEF, PARAMS = nnx.split(Network(nnx.Rngs(0)))
CONDITION = jax.random.normal(jax.random.key(1), (B, 8))


def policy(params, frozen):
    del frozen
    return lambda x, t, condition: nnx.merge(GRAPHDEF, params)(x, t.astype(jnp.float32), condition)


def moved(params, size=0.02):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [p + size * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(2), B)
    noise = jax.random.normal(jax.random.key(3), (B, *SHAPE))
    draw = jax.jit(
        lambda p: sample(policy(p, None), SCHEDULE, noise, keys, CONDITION, reduction="mean")
    )
    trajectory = draw(PARAMS)
    reference = moved(PARAMS, 0.05)
    means = reference_means(
        policy(reference, None), SCHEDULE, trajectory.latents, CONDITION, jnp.arange(T)
    )
    advantages = jnp.asarray([1.0, -0.5, 0.3, -1.2, 0.0, 0.8])
    return UpdateBatch(trajectory, CONDITION, advantages, means)


def whole_loss(params, batch, config, weights, steps):
    """The loss as the paper writes it, all steps and images at once, log-density from jax.scipy."""
    x = batch.trajectory.latents
    means, log_probs = [], []
    for i in range(T):
        out = policy(params, None)(x[i], SCHEDULE.timesteps[i], CONDITION)
        mean, std = step_distribution(SCHEDULE, i, x[i], out)
        element = norm.logpdf(x[i + 1], mean, std)
        reduce = jnp.mean if config.reduction == "mean" else jnp.sum
        log_probs.append(reduce(element, axis=(1, 2, 3)))
        means.append((mean, std))
    log_ratio = jnp.stack(log_probs) - batch.trajectory.log_probs

    def surrogate(log_ratio, a):
        ratio = jnp.exp(log_ratio)
        return jnp.maximum(
            -a * ratio, -a * jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        )

    if config.ratio == "trajectory":
        total = (weights[:, None] * log_ratio).sum(0)
        loss = surrogate(total, batch.advantages).mean()
    else:
        loss = jnp.stack([surrogate(log_ratio[i], batch.advantages).mean() for i in steps]).mean()
    kl = 0.0
    for i in steps:
        mean, std = means[i]
        divergence = jnp.square(mean - batch.reference_means[i]) / (2 * std**2)
        reduce = jnp.mean if config.reduction == "mean" else jnp.sum
        kl += reduce(divergence, axis=(1, 2, 3)).mean()
    return loss + config.beta * kl


def gradient(params, batch, config, weights, steps, on_policy):
    compiled = jax.jit(
        lambda params: loss_gradient(
            policy,
            config,
            params,
            None,
            SCHEDULE,
            batch,
            weights,
            jnp.asarray(steps),
            jnp.asarray(steps),
            on_policy=on_policy,
        )
    )
    return compiled(params)


def assert_close(ours, expected, tolerance=2e-4):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


UNIFORM = jnp.ones(T)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 6])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_trajectory_ratio_gradient_equals_autodiff_of_the_whole_loss(batch, microbatch, beta):
    config = LossConfig(clip_low=0.05, clip_high=0.05, beta=beta, microbatch=microbatch)
    params = moved(PARAMS)
    ours, _ = gradient(params, batch, config, UNIFORM, range(T), on_policy=False)
    expected = jax.grad(whole_loss)(params, batch, config, UNIFORM, range(T))
    assert_close(ours, expected)


def test_gain_weights_enter_the_trajectory_ratio(batch):
    weights = step_weights(SCHEDULE, "gain")
    config = LossConfig(clip_low=0.05, clip_high=0.05, microbatch=2)
    steps = np.flatnonzero(np.asarray(weights) > 0)
    assert len(steps) == T - 1
    ours, _ = gradient(moved(PARAMS), batch, config, weights, steps, on_policy=False)
    assert_close(ours, jax.grad(whole_loss)(moved(PARAMS), batch, config, weights, steps))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_step_ratio_gradient_equals_autodiff_of_the_whole_loss(batch, reduction):
    if reduction == "sum":
        size = float(np.prod(SHAPE))
        trajectory = batch.trajectory._replace(log_probs=batch.trajectory.log_probs * size)
        batch = batch._replace(trajectory=trajectory)
    config = LossConfig(
        ratio="step", clip_low=0.05, clip_high=0.05, beta=0.1, microbatch=3, reduction=reduction
    )
    ours, _ = gradient(moved(PARAMS, 0.005), batch, config, UNIFORM, range(T), on_policy=False)
    expected = jax.grad(whole_loss)(moved(PARAMS, 0.005), batch, config, UNIFORM, range(T))
    assert_close(ours, expected)


def test_first_update_needs_no_sweep_and_gives_the_same_gradient(batch):
    config = LossConfig(clip_low=0.05, clip_high=0.05, beta=0.3, microbatch=2)
    short, metrics = gradient(PARAMS, batch, config, UNIFORM, range(T), on_policy=True)
    swept, swept_metrics = gradient(PARAMS, batch, config, UNIFORM, range(T), on_policy=False)
    assert_close(short, swept, 1e-6)
    assert float(metrics["ratio/min"]) == float(metrics["ratio/max"]) == 1.0
    assert float(swept_metrics["ratio/max"]) == pytest.approx(1.0, abs=1e-6)


def test_clipped_images_have_no_gradient(batch):
    config = LossConfig(clip_low=1e-6, clip_high=1e-6, microbatch=6)
    params = moved(PARAMS, 0.02)
    free = dataclasses.replace(config, clip_low=0.99, clip_high=1e9)
    _, metrics = gradient(params, batch, free, UNIFORM, range(T), on_policy=False)
    assert float(metrics["clip_fraction"]) == 0.0
    _, metrics = gradient(params, batch, config, UNIFORM, range(T), on_policy=False)
    # every ratio is outside of the range; half of them, roughly, on the side where clipping acts
    assert 0.0 < float(metrics["clip_fraction"]) < 1.0
    ours, _ = gradient(params, batch, config, UNIFORM, range(T), on_policy=False)
    assert_close(ours, jax.grad(whole_loss)(params, batch, config, UNIFORM, range(T)))


def test_a_few_steps_are_an_unbiased_estimate(batch):
    """The mean over all C(5, 2) subsets equals the full gradient."""
    import itertools

    config = LossConfig(clip_low=0.05, clip_high=0.05, beta=0.2, microbatch=3)
    params = moved(PARAMS)
    full, _ = gradient(params, batch, config, UNIFORM, range(T), on_policy=False)
    subsets = list(itertools.combinations(range(T), 2))
    compiled = jax.jit(
        lambda steps: loss_gradient(
            policy, config, params, None, SCHEDULE, batch, UNIFORM, jnp.arange(T), steps,
            on_policy=False,
        )[0]
    )  # fmt: skip
    total = None
    for steps in subsets:
        part = compiled(jnp.asarray(steps))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    assert_close(jax.tree.map(lambda x: x / len(subsets), total), full)


def test_gradient_never_reaches_the_reference(batch):
    config = LossConfig(beta=1.0, microbatch=6)

    def loss_of(means):
        moved_batch = batch._replace(reference_means=means, advantages=jnp.zeros(B))
        _, metrics = loss_gradient(
            policy, config, PARAMS, None, SCHEDULE, moved_batch, UNIFORM, jnp.arange(T),
            jnp.arange(T), on_policy=True,
        )  # fmt: skip
        return metrics["kl"]

    assert float(loss_of(batch.reference_means)) > 0
    policy_gradient, _ = gradient(
        PARAMS, batch._replace(advantages=jnp.zeros(B)), config, UNIFORM, range(T), on_policy=True
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(policy_gradient)) > 0


def test_update_improves_the_surrogate_and_counts_nothing_as_skipped(batch):
    config = LossConfig(clip_low=0.2, clip_high=0.2, microbatch=3)
    optimizer = optax.adam(1e-3)
    update = make_update(policy, config, optimizer)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = TrainState(params, optimizer.init(params))
    arguments = (None, SCHEDULE, batch, UNIFORM, jnp.arange(T), jnp.arange(T))
    state, first = update(state, *arguments, on_policy=True)
    state, second = update(state, *arguments, on_policy=False)
    assert float(second["policy_loss"]) < float(first["policy_loss"])
    assert float(first["skipped"]) == float(second["skipped"]) == 0.0
    assert float(second["approx_kl"]) > 0


def test_a_gradient_that_is_not_finite_leaves_the_parameters(batch):
    config = LossConfig(microbatch=3)
    optimizer = optax.adam(1e-3)
    update = make_update(policy, config, optimizer)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = TrainState(params, optimizer.init(params))
    bad = batch._replace(advantages=batch.advantages.at[0].set(jnp.nan))
    state, metrics = update(
        state, None, SCHEDULE, bad, UNIFORM, jnp.arange(T), jnp.arange(T), on_policy=True
    )
    assert float(metrics["skipped"]) == 1.0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(PARAMS), strict=True):
        assert (a == b).all()


def test_trajectory_is_a_pytree():
    assert len(jax.tree.leaves(Trajectory(1, 2, 3))) == 3
