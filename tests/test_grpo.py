import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion_grpo.errors import UsageError
from diffusion_grpo.grpo import (
    clipped_surrogate,
    group_advantages,
    kl_estimate,
    uninformative_groups,
)

REWARDS = np.array([0.1, 0.4, 0.35, 2.0, -1.0, 0.0, 5.7, 5.8, 5.71, 3.0, 3.0, 4.0], np.float32)


def _expected(rewards, size, kind):
    """The formulas in float64, sample by sample."""
    r = rewards.astype(np.float64)
    out = np.zeros_like(r)
    for i in range(len(r)):
        start = i // size * size
        group = r[start : start + size]
        others = np.delete(group, i - start)
        out[i] = {
            "group": (r[i] - group.mean()) / (group.std() + 1e-8),
            "group_mean": r[i] - group.mean(),
            "group_global_std": (r[i] - group.mean()) / (r.std() + 1e-8),
            "leave_one_out": r[i] - others.mean(),
        }[kind]
    return out


@pytest.mark.parametrize("kind", ["group", "group_mean", "group_global_std", "leave_one_out"])
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_advantages_equal_the_formula_in_float64(kind, size):
    ours = group_advantages(jnp.asarray(REWARDS), size, kind=kind)
    np.testing.assert_allclose(ours, _expected(REWARDS, size, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 5.7, 22.13, 1e6, -0.3])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 12])
@pytest.mark.parametrize("kind", ["group", "group_mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero_advantage(value, size, kind):
    rewards = jnp.full((2 * size,), value, jnp.float32)
    assert (group_advantages(rewards, size, kind=kind) == 0).all()
    assert uninformative_groups(rewards, size).all()


def test_one_equal_group_beside_another_is_zero_for_the_global_std_too():
    rewards = jnp.asarray([5.7] * 3 + [1.0, 2.0, 4.0], jnp.float32)
    advantages = group_advantages(rewards, 3, kind="group_global_std")
    assert (advantages[:3] == 0).all() and (advantages[3:] != 0).all()
    assert uninformative_groups(rewards, 3).tolist() == [True, False]


def test_advantages_are_clipped():
    rewards = jnp.asarray([0.0] * 15 + [1.0], jnp.float32)
    free = group_advantages(rewards, 16)
    assert float(free.max()) == pytest.approx(np.sqrt(15), rel=1e-5)
    assert float(group_advantages(rewards, 16, clip=2.0).max()) == 2.0


@pytest.mark.parametrize(("count", "size", "named"), [(6, 1, "2 or more"), (6, 4, "do not divide")])
def test_groups_that_do_not_fit_are_errors(count, size, named):
    with pytest.raises(UsageError, match=named):
        group_advantages(jnp.zeros(count), size)


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
