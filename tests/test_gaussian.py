"""Entropy and the KL of two scales against PyTorch's distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_grpo.gaussian import gaussian_entropy, gaussian_kl

P, Q = (np.random.default_rng(seed).normal(size=(3, 4, 4, 2)) for seed in (0, 1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_of_two_scales_and_its_gradient_agree_with_torch(reduction):
    p, std = torch.tensor(P, requires_grad=True), torch.tensor([0.3, 1.0, 2.5], requires_grad=True)
    other = torch.tensor([0.5, 1.0, 0.7])
    one, two = (x.double().reshape(3, 1, 1, 1).expand(P.shape) for x in (std, other))
    divergence = kl_divergence(Normal(p, one), Normal(torch.tensor(Q), two))
    want = getattr(divergence, reduction)((1, 2, 3))
    want.sum().backward()

    def kl(p, std):
        return gaussian_kl(
            p,
            jnp.asarray(Q, jnp.float32),
            std,
            reduction=reduction,
            std_q=jnp.asarray(other.numpy()),
        )

    arguments = jnp.asarray(P, jnp.float32), jnp.asarray(std.detach().numpy())
    np.testing.assert_allclose(kl(*arguments), want.detach(), rtol=1e-5)
    gradients = jax.grad(lambda *x: kl(*x).sum(), argnums=(0, 1))(*arguments)
    for ours, theirs in zip(gradients, (p.grad, std.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=1e-5)


def test_kl_of_scales_that_hardly_differ_is_not_lost_in_rounding():
    mean, std = jnp.zeros((6, 2, 2, 1)), np.linspace(1.0005, 1.003, 6).astype(np.float32)
    found = gaussian_kl(mean, mean, jnp.asarray(std), reduction="mean", std_q=jnp.ones(6))
    exact = std.astype(np.float64)
    want = (exact**2 - 1) / 2 - np.log(exact)
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_kl_of_equal_scales_needs_no_second_one():
    p, q = jnp.asarray(P, jnp.float32), jnp.asarray(Q, jnp.float32)
    std = jnp.asarray([0.3, 0.0, 2.5])
    one = gaussian_kl(p, q, std, reduction="mean")
    two = gaussian_kl(p, q, std, reduction="mean", std_q=std)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    assert one[1] == two[1] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_entropy_agrees_with_torch_and_is_absent_without_noise(reduction):
    std = np.array([0.2, 0.9, 3.0])
    element = Normal(torch.zeros(3), torch.tensor(std)).entropy().numpy()
    want = element * (32 if reduction == "sum" else 1)
    np.testing.assert_allclose(
        gaussian_entropy(jnp.asarray(std, jnp.float32), 32, reduction=reduction), want, rtol=1e-5
    )
    assert gaussian_entropy(jnp.asarray(0.0), 32, reduction=reduction) == 0
    slope = jax.grad(lambda s: gaussian_entropy(s, 32, reduction=reduction).sum())(
        jnp.asarray([0.0, 0.5])
    )
    np.testing.assert_allclose(slope, [0.0, 2.0 * (32 if reduction == "sum" else 1)])
