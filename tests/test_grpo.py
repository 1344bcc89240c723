"""Surrogates, ratios and KL estimators against PyTorch, closed forms and Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import norm

from diffusion_grpo.grpo import (
    adapted_beta,
    clipped_surrogate,
    guarded_log_ratio,
    kl_estimate,
    masked_surrogate,
    scaled_clip,
)


def test_surrogate_and_its_gradient_agree_with_torch():
    log_ratio = np.linspace(-0.5, 0.5, 41).astype(np.float32)
    for sign in (1.0, -1.0):
        a = np.full_like(log_ratio, sign * 0.7)
        x = torch.tensor(log_ratio, requires_grad=True)
        ratio = x.exp()
        t = torch.maximum(
            -torch.tensor(a) * ratio, -torch.tensor(a) * torch.clamp(ratio, 1 - 0.1, 1 + 0.2)
        )
        t.sum().backward()

        def loss(x, a=a):
            return clipped_surrogate(x, jnp.asarray(a), clip_low=0.1, clip_high=0.2)[0].sum()

        ours, clipped = clipped_surrogate(
            jnp.asarray(log_ratio), jnp.asarray(a), clip_low=0.1, clip_high=0.2
        )
        np.testing.assert_allclose(ours, t.detach().numpy(), rtol=1e-6)
        gradient = jax.grad(loss)(jnp.asarray(log_ratio))
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-5, atol=1e-7)
        assert (np.asarray(clipped) == (x.grad.numpy() == 0)).all()


def test_gradient_at_ratio_one_is_minus_the_advantage():
    a = jnp.asarray([1.5, -2.0, 0.0])

    def loss(x):
        return clipped_surrogate(x, a, clip_low=1e-4, clip_high=1e-4)[0].sum()

    assert (jax.grad(loss)(jnp.zeros(3)) == -a).all()


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_beyond_float32_has_the_gradient_of_ppo(advantage):
    # In float64 e^100 is finite; PyTorch differentiates it there.
    x = torch.tensor([100.0], dtype=torch.float64, requires_grad=True)
    ratio, dual = x.exp(), 3.0
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 0.9, 1.2))
    if advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-advantage * dual, dtype=torch.float64))
    loss.sum().backward()

    def ours(x):
        losses, _ = clipped_surrogate(
            x, jnp.asarray([advantage]), clip_low=0.1, clip_high=0.2, dual_clip=dual
        )
        return losses.sum()

    value, slope = jax.value_and_grad(ours)(jnp.asarray([100.0]))
    assert float(value) == pytest.approx(loss.item(), rel=1e-6)
    assert float(slope[0]) == x.grad.item() == 0


def test_a_dropped_sample_whose_ratio_is_beyond_float32_has_no_gradient():
    def ours(x):
        one = jnp.asarray([1.0])
        return masked_surrogate(x, one, one, limit=0.5)[0].sum()

    assert float(jax.grad(ours)(jnp.asarray([100.0]))[0]) == 0


def test_kl_estimators_against_the_closed_form():
    # KL(N(m, 1) ‖ N(0, 1)) = m²/2, with samples of the first
    m, n = 0.3, 400_000
    x = np.random.default_rng(0).normal(m, 1.0, n)
    delta = jnp.asarray(m * x - m * m / 2, jnp.float32)
    exact = m * m / 2
    for kind, tolerance in (("k1", 5 * m / np.sqrt(n)), ("k3", 5e-4)):
        assert abs(float(kl_estimate(delta, kind).mean()) - exact) < tolerance
    # k2 = δ²/2 has expectation (m² + m⁴/4)/2
    assert float(kl_estimate(delta, "k2").mean()) == pytest.approx((m**2 + m**4 / 4) / 2, rel=0.01)
    assert (kl_estimate(delta, "k2") >= 0).all() and (kl_estimate(delta, "k3") >= -1e-6).all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_of_a_kl_estimator_is_that_of_its_formula(kind):
    delta = np.linspace(-1.5, 1.5, 31)
    x = torch.tensor(delta, requires_grad=True)
    formula = {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x}[kind]
    formula.sum().backward()
    ours = jax.grad(lambda x: kl_estimate(x, kind).sum())(jnp.asarray(delta, jnp.float32))
    np.testing.assert_allclose(ours, x.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_k3_of_a_small_log_ratio_is_not_lost_in_rounding():
    delta = 2.0 ** -np.arange(6, 11)  # as they are where log-probs are means over a latent
    for sign in (1, -1):
        found = kl_estimate(jnp.asarray(sign * delta, jnp.float32), "k3")
        np.testing.assert_allclose(found, np.expm1(-sign * delta) + sign * delta, rtol=1e-3)


def test_expected_gradients_of_the_kl_estimators_are_those_documented():
    # π_θ = N(m, 1), π_ref = N(0, s²), samples of π_θ; the gradients with respect to m.
    m, s, n = 0.4, 1.3, 1_000_000
    x = np.random.default_rng(1).normal(m, 1.0, n)
    delta = norm.logpdf(x, m, 1) - norm.logpdf(x, 0, s)
    score = x - m
    mean = {}
    for kind in ("k1", "k2", "k3"):
        slope = jax.grad(lambda d, kind=kind: kl_estimate(d, kind).sum())(
            jnp.asarray(delta, jnp.float32)
        )
        mean[kind] = (np.asarray(slope) * score).mean()
    tolerance = 5 / np.sqrt(n) * 2
    assert abs(mean["k1"]) < tolerance
    assert abs(mean["k2"] - m / s**2) < tolerance  # ∂/∂m of KL(π_θ ‖ π_ref) = m²/(2s²) + …
    assert abs(mean["k3"] - m) < tolerance  # ∂/∂m of KL(π_ref ‖ π_θ) = (s² + m²)/2 + …


def test_dual_clip_bounds_the_loss_of_bad_samples_and_agrees_with_torch():
    log_ratio = np.linspace(-1.5, 1.5, 61).astype(np.float32)
    for sign in (1.0, -1.0):
        a = np.full_like(log_ratio, sign * 0.7)
        x = torch.tensor(log_ratio, requires_grad=True)
        ratio, at = x.exp(), torch.tensor(a)
        objective = torch.minimum(at * ratio, at * torch.clamp(ratio, 0.8, 1.2))
        if sign < 0:
            objective = torch.maximum(objective, 2.5 * at)
        (-objective).sum().backward()

        def loss(x, a=a):
            return clipped_surrogate(x, jnp.asarray(a), clip_low=0.2, clip_high=0.2, dual_clip=2.5)

        ours, clipped = loss(jnp.asarray(log_ratio))
        np.testing.assert_allclose(ours, -objective.detach().numpy(), rtol=1e-6)
        gradient = jax.grad(lambda x: loss(x)[0].sum())(jnp.asarray(log_ratio))
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-5, atol=1e-7)
        assert (np.asarray(clipped) == (x.grad.numpy() == 0)).all()


def test_dppo_drops_what_is_far_and_moves_outward():
    # The last three: at the limit, at the old policy's density, and without an advantage.
    log_ratio = jnp.asarray([0.3, 0.3, -0.3, -0.3, 0.3, -0.3, 0.3, 0.0, 0.3])
    advantages = jnp.asarray([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, 2.0, 0.0])
    divergence = jnp.asarray([0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.1, 0.2, 0.2])

    def loss(x):
        return masked_surrogate(x, advantages, divergence, limit=0.1)

    assert loss(log_ratio)[1].tolist() == [True, False, False, True] + 5 * [False]
    gradient = jax.grad(lambda x: loss(x)[0].sum())(log_ratio)
    want = -np.asarray(advantages) * np.exp(np.asarray(log_ratio)) * [0, 1, 1, 0, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(gradient, want, rtol=1e-6)
    # What is dropped counts nothing in the loss either: the rest is −A ρ, its own gradient.
    np.testing.assert_allclose(loss(log_ratio)[0], want, rtol=1e-6)


def test_guarded_ratio_is_centered_and_spreads_alike_at_every_noise():
    # log ρ of draws of the old policy: mean −Δμ²/(2σ²), spread Δμ/σ; guarded: mean 0, spread Δμ.
    rng, change, n = np.random.default_rng(0), 0.02, 200_000
    for std in (0.05, 0.3, 1.0):
        x = rng.normal(0.0, std, n)
        plain = norm.logpdf(x, change, std) - norm.logpdf(x, 0.0, std)
        divergence = change**2 / (2 * std**2)
        assert abs(plain.mean() + divergence) < 5 * change / std / np.sqrt(n)
        guarded = np.asarray(
            guarded_log_ratio(
                jnp.asarray(plain, jnp.float32), jnp.full(n, divergence), jnp.asarray(std)
            )
        )
        assert abs(guarded.mean()) < 5 * change / np.sqrt(n)
        np.testing.assert_allclose(guarded.std(), change, rtol=0.02)


def test_a_clip_range_is_scaled_in_the_log_ratio():
    low, high = scaled_clip(1e-4, 2e-4, 16384.0)
    assert 1 - low == pytest.approx(0.9999**16384, rel=1e-9)
    assert 1 + high == pytest.approx(1.0002**16384, rel=1e-9)
    low, high = scaled_clip(1e-4, 1e-4, 8.0)
    assert (low, high) == (pytest.approx(8e-4, rel=1e-3), pytest.approx(8e-4, rel=1e-3))
    assert scaled_clip(0.2, 0.3, 1.0) == (pytest.approx(0.2), pytest.approx(0.3))
    low, high = scaled_clip(0.1, 0.1, 1e6)
    assert 0.0 < low <= 1.0 and np.isfinite(np.float32(high))
    assert high == pytest.approx(np.expm1(80.0), rel=1e-12)  # as documented: the end of the range


def test_adaptive_beta_moves_towards_the_target_and_no_faster_than_two_percent():
    assert adapted_beta(0.5, 0.02, 0.02) == 0.5
    assert adapted_beta(0.5, float("nan"), 0.02) == adapted_beta(0.5, float("inf"), 0.02) == 0.5
    assert adapted_beta(0.5, 0.022, 0.02) == pytest.approx(0.5 * 1.01)
    assert adapted_beta(0.5, 9.0, 0.02) == pytest.approx(0.5 * 1.02)
    assert adapted_beta(0.5, 0.0, 0.02) == pytest.approx(0.5 * 0.98)
    # a policy whose KL is 1/β ends where the KL is the target, from either side
    for beta in (1e-3, 1e5):
        for _ in range(1500):
            beta = adapted_beta(beta, 1 / beta, 0.02)
        assert 1 / beta == pytest.approx(0.02, rel=1e-3)
