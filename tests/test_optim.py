"""Optimizers and learning rates against PyTorch and Transformers, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.optimization import Adafactor

from diffusion_grpo.learning_sections import OptimConfig
from diffusion_grpo.optim import TrainState, learning_rate, make_optimizer, make_update

START = {
    "kernel": np.random.default_rng(0).normal(size=(130, 140)).astype(np.float32),
    "bias": np.random.default_rng(1).normal(size=140).astype(np.float32),
}
GRADIENTS = [
    {
        name: np.random.default_rng(10 * i + len(name)).normal(size=x.shape).astype(np.float32)
        for name, x in START.items()
    }
    for i in range(5)
]


def ours(options, updates=1, iterations=100):
    optimizer, _ = make_optimizer(options, updates, iterations)
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        with jax.numpy_dtype_promotion("standard"):
            changes, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, changes)
    return params


def theirs(make, groups=lambda params: list(params.values()), rates=None, norm=1.0):
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in START.items()}
    optimizer = make(groups(params))
    for i, gradient in enumerate(GRADIENTS):
        for name, parameter in params.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(list(params.values()), norm)
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[i]
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in params.items()}


def assert_same(a, b, rtol=1e-4):
    for name, start in START.items():
        moved = np.abs(b[name] - start).max()
        assert moved > 0
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=rtol * moved)


def test_adamw_equals_torch_with_warm_up_and_gradient_clipping():
    options = OptimConfig(learning_rate=0.01, weight_decay=0.1, warmup_iterations=3)
    rates = [0.01 * min(1, (i + 1) / 4) for i in range(5)]
    assert_same(
        ours(options), theirs(lambda p: torch.optim.AdamW(p, weight_decay=0.1), rates=rates)
    )


def test_weight_decay_on_matrices_leaves_the_others():
    options = OptimConfig(learning_rate=0.01, weight_decay=0.5, weight_decay_on="matrices")

    def groups(params):
        return [
            {"params": [params["kernel"]], "weight_decay": 0.5},
            {"params": [params["bias"]], "weight_decay": 0.0},
        ]

    want = theirs(lambda p: torch.optim.AdamW(p, lr=0.01), groups)
    assert_same(ours(options), want)
    everywhere = ours(OptimConfig(learning_rate=0.01, weight_decay=0.5))
    assert np.abs(everywhere["bias"] - want["bias"]).max() > 1e-3


def test_adafactor_equals_that_of_transformers():
    options = OptimConfig(optimizer="adafactor", learning_rate=0.01, weight_decay=0.1)

    def make(params):
        return Adafactor(
            params, lr=0.01, weight_decay=0.1, scale_parameter=False, relative_step=False
        )

    assert_same(ours(options), theirs(make), rtol=1e-3)


def test_lion_equals_the_paper_s_rule():
    options = OptimConfig(
        optimizer="lion", learning_rate=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1
    )
    params = {name: x.astype(np.float64) for name, x in START.items()}
    momentum = {name: np.zeros_like(x) for name, x in params.items()}
    for gradient in GRADIENTS:
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradient.values()))
        for name, x in params.items():
            g, m = gradient[name].astype(np.float64) / max(norm, 1.0), momentum[name]
            params[name] = x - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * x)
            momentum[name] = 0.99 * m + 0.01 * g
    assert_same(ours(options), params)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_equal_torch_s_schedulers(schedule):
    options = OptimConfig(
        learning_rate=2.0,
        schedule=schedule,
        final_learning_rate=0.0 if schedule == "constant" else 0.5,
        warmup_iterations=5,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    later = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, 20),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, 0.5),
    }[schedule]()
    rate = learning_rate(options, 25)
    for i in range(5):
        assert float(rate(i)) == pytest.approx(2.0 * (i + 1) / 6)
    for i in range(5, 25):
        assert float(rate(i)) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
        optimizer.step()
        later.step()


def test_the_rate_counts_iterations_not_updates():
    optimizer, rate = make_optimizer(OptimConfig(warmup_iterations=1, max_grad_norm=1e9), 2, 10)
    assert rate(0) == pytest.approx(1.5e-4) and rate(1) == pytest.approx(3e-4)
    params = {"w": jnp.zeros((2, 2))}
    state, steps = optimizer.init(params), []
    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):
            changes, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        steps.append(-float(changes["w"][0, 0]))
    np.testing.assert_allclose(steps, [1.5e-4, 1.5e-4, 3e-4, 3e-4], rtol=1e-4)


def test_the_average_follows_the_parameters_and_is_what_is_evaluated():
    optimizer = optax.sgd(1.0)
    update = make_update(lambda params, g: ({"w": g}, {"loss": g.sum()}), optimizer, ema_decay=0.75)
    params = {"w": jnp.zeros(2)}
    state = TrainState(params, optimizer.init(params), {"w": jnp.zeros(2)}, jnp.int32(0))
    weight, average = 0.0, 0.0
    for g in (1.0, -2.0, 0.5):
        state, metrics = update(state, jnp.full(2, g))
        weight -= g
        average = 0.75 * average + 0.25 * weight
        np.testing.assert_allclose(state.params["w"], weight)
        np.testing.assert_allclose(state.evaluated["w"], average, rtol=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(abs(g) * 2**0.5)
    assert TrainState(params, None).evaluated is params
