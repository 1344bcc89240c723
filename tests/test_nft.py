"""DiffusionNFT on Gaussian data, where what it should learn is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from schedulers import scheduler

from diffusion_grpo.nft import (
    NFTBatch,
    NFTConfig,
    compile_nft,
    draw_timesteps,
    make_nft_gradient,
    nft_losses,
)
from diffusion_grpo.rollout import image_keys, initial_noise
from diffusion_grpo.schedule import add_noise, alphas_cumprod, make_schedule

SCHEDULER = scheduler()
ABAR = alphas_cumprod(SCHEDULER)
STEPS = make_schedule(SCHEDULER, 5, eta=0.0).timesteps
SHAPE, SPREAD, CENTER = (4, 4, 1), 0.7, 0.3
SIZE = 16


def test_loss_and_gradient_equal_the_paper_s_formula_in_torch():
    rng = np.random.default_rng(0)
    new, old, x0 = (rng.normal(size=(5, 3, 3, 2)).astype(np.float32) for _ in range(3))
    a = np.array([-9.0, -2.0, 0.0, 1.0, 30.0], np.float32)
    x = torch.tensor(new, requires_grad=True)
    t_old, t_x0, beta, most = torch.tensor(old), torch.tensor(x0), 0.3, 4.0
    r = torch.clamp(torch.tensor(a) / most, -1, 1) * 0.5 + 0.5
    total = torch.zeros(5)
    for weight, mix in ((r, beta * x + (1 - beta) * t_old), (1 - r, (1 + beta) * t_old - beta * x)):
        with torch.no_grad():
            size = (mix - t_x0).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
        total = total + weight * ((mix - t_x0) ** 2 / size).mean((1, 2, 3)) * most / beta
    total.sum().backward()

    def loss(new, old):
        return nft_losses(new, old, jnp.asarray(x0), jnp.asarray(a), beta=beta, advantage_max=most)

    np.testing.assert_allclose(loss(jnp.asarray(new), jnp.asarray(old)), total.detach(), rtol=1e-5)
    to_new, to_old = jax.grad(lambda *x: loss(*x).sum(), argnums=(0, 1))(
        jnp.asarray(new), jnp.asarray(old)
    )
    np.testing.assert_allclose(to_new, x.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert (to_old == 0).all()


def test_a_perfect_prediction_has_no_loss_and_a_finite_gradient():
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 2)), jnp.float32)

    def loss(new):
        return nft_losses(new, x0, x0, jnp.asarray([1.0, -1.0]), beta=0.5, advantage_max=5.0).sum()

    value, slope = jax.value_and_grad(loss)(x0)
    assert float(value) == 0 and not np.asarray(slope).any()


def test_each_image_draws_its_own_timesteps_of_the_sampler_without_repeats():
    keys = image_keys(0, 0, np.zeros(200, int), np.arange(200), "loss")
    drawn = np.asarray(draw_timesteps(keys, STEPS, 3))
    assert drawn.shape == (200, 3)
    assert set(drawn.ravel().tolist()) == set(np.asarray(STEPS).tolist())
    assert all(len(set(row.tolist())) == 3 for row in drawn)
    counts = np.unique(drawn, return_counts=True)[1]
    assert counts.min() > 90 and counts.max() < 150  # 120 each
    assert np.asarray(draw_timesteps(keys[:4], STEPS, 3)).tolist() == drawn[:4].tolist()


def exact(prediction, t):
    """a, b of the perfect prediction a x_t + b for x₀ ~ N(CENTER, SPREAD²), and Var(x₀ | x_t)."""
    abar = ABAR[np.asarray(t)]
    total = abar * SPREAD**2 + 1 - abar
    gain = np.sqrt(abar) * SPREAD**2 / total  # of E[x₀ | x_t]
    shift = CENTER * (1 - abar) / total
    if prediction == "sample":
        return gain, shift, SPREAD**2 * (1 - abar) / total
    # from x̂₀ to what the network predicts, which is linear in x_t and x̂₀
    if prediction == "epsilon":
        on_x, on_x0 = 1 / np.sqrt(1 - abar), -np.sqrt(abar / (1 - abar))
    else:
        on_x, on_x0 = np.sqrt(abar / (1 - abar)), -1 / np.sqrt(1 - abar)
    return on_x + on_x0 * gain, on_x0 * shift, SPREAD**2 * (1 - abar) / total


def network(params, frozen):
    """A line a x + b of its own at each timestep."""
    del frozen

    def denoise(x, t, condition):
        which = (t[:, None] == STEPS[None]).astype(jnp.float32)
        a, b = (which @ params[name] for name in ("a", "b"))
        return a[:, None, None, None] * x + b[:, None, None, None]

    return denoise


def start(prediction):
    a, b, _ = exact(prediction, STEPS)
    return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


def data(count, advantage_of):
    rng = np.random.default_rng(3)
    x0 = CENTER + SPREAD * rng.normal(size=(count, *SHAPE))
    keys = image_keys(0, 0, np.zeros(count, int), np.arange(count), "loss")
    timesteps = jnp.broadcast_to(STEPS, (count, len(STEPS)))
    advantages = jnp.asarray(advantage_of(x0), jnp.float32)
    return NFTBatch(
        jnp.asarray(x0, jnp.float32), jnp.zeros((count, 1)), advantages, timesteps, keys
    )


def sum_of_pixels(x0):
    return ((x0 - CENTER) / SPREAD).sum((1, 2, 3)) / np.sqrt(SIZE)  # standard normal


def compiled(prediction, **options):
    config = NFTConfig(prediction_type=prediction, microbatch=2000, **options)
    return make_nft_gradient(compile_nft(network, config, ABAR))


@pytest.mark.parametrize(
    "prediction",
    [
        "v_prediction",
        pytest.param("epsilon", marks=pytest.mark.slow),
        pytest.param("sample", marks=pytest.mark.slow),
    ],
)
def test_it_learns_the_shift_of_the_posterior_toward_the_reward(prediction):
    """The minimum is x̂_old + E[(2r − 1)(x₀ − x̂_old) | x_t]/β.

    With A the standardized sum of the pixels and no clipping, 2r − 1 = A/A_max, and the shift is
    Var(x₀ | x_t)/(SPREAD √D A_max β) at every pixel.
    """
    beta, most = 0.5, 5.0
    old = start(prediction)
    batch = data(4000, sum_of_pixels)
    run = compiled(prediction, beta=beta, advantage_max=most)
    optimizer = optax.adam(optax.exponential_decay(3e-3, 1, 0.985))
    params, state = old, optimizer.init(old)
    for i in range(150):
        # new noise each time, the same images
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(batch.keys, i)
        gradient, _ = run(params, old, old, None, batch._replace(keys=keys), jnp.float32(0))
        with jax.numpy_dtype_promotion("standard"):
            changes, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    abar = ABAR[np.asarray(STEPS)]
    to_x0 = {
        "v_prediction": -np.sqrt(1 - abar),
        "epsilon": -np.sqrt((1 - abar) / abar),
        "sample": np.ones(5),
    }[prediction]
    # at the mean of x_t, where a small error of the slope does not count
    center = np.sqrt(abar) * CENTER
    shift = to_x0 * (
        (params["a"] - old["a"]) * jnp.asarray(center, jnp.float32) + params["b"] - old["b"]
    )
    want = exact(prediction, STEPS)[2] / (SPREAD * np.sqrt(SIZE) * most * beta)
    learned = want > 0.02 * SPREAD  # the last step has almost no noise to shift
    assert learned.sum() >= 4
    np.testing.assert_allclose(shift[learned], want[learned], rtol=0.15)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_loss_is_the_mean_over_images_and_timesteps_of_the_formula(prediction):
    old = start(prediction)
    new = {"a": old["a"] + 0.05, "b": old["b"] - 0.1}
    batch, beta, most = data(5, sum_of_pixels), 0.3, 4.0
    config = NFTConfig(prediction_type=prediction, beta=beta, advantage_max=most, microbatch=2)
    run = make_nft_gradient(compile_nft(network, config, ABAR))
    _, metrics = run(new, old, old, None, batch, jnp.float32(0))
    good = np.clip(np.asarray(batch.advantages, np.float64) / (2 * most) + 0.5, 0, 1)
    want = []
    for j, t in enumerate(np.asarray(STEPS)):
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(batch.keys, j)
        x0, noise = (np.asarray(x, np.float64) for x in (batch.x0, initial_noise(keys, SHAPE)))
        signal, scale = np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])
        x_t = signal * x0 + scale * noise
        by_new, by_old = (float(p["a"][j]) * x_t + float(p["b"][j]) for p in (new, old))
        if prediction == "v_prediction":
            by_new, by_old = (signal * x_t - scale * output for output in (by_new, by_old))
        if prediction == "epsilon":  # √ᾱ times x̂₀ and x₀
            by_new, by_old = (x_t - scale * output for output in (by_new, by_old))
            x0 = signal * x0
        for weight, toward in ((good, beta), (1 - good, -beta)):
            gap = by_old + toward * (by_new - by_old) - x0
            each = np.square(gap).mean((1, 2, 3)) / np.abs(gap).mean((1, 2, 3))
            want.append(most / beta * weight * each)
    np.testing.assert_allclose(metrics["loss"], np.sum(want) / (5 * 5), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_gradient_at_the_noisiest_timestep_is_bounded(prediction):
    """As published, ε's would be √((1−ᾱ)/ᾱ) = 14.6 times its x̂₀ error there: most of the sum."""
    old = start(prediction)
    batch = data(2000, sum_of_pixels)
    gradient, _ = compiled(prediction)(old, old, old, None, batch, jnp.float32(0))
    sizes = np.abs(np.asarray(gradient["b"], np.float64))
    assert 1 / ABAR[999] - 1 > 14**2
    assert sizes[0] < 2.5 * np.median(sizes)


def test_advantages_of_zero_teach_nothing_on_average_and_equal_policies_are_a_minimum():
    old = start("v_prediction")
    batch = data(2000, lambda x0: np.zeros(len(x0)))
    run = compiled("v_prediction")
    gradient, metrics = run(old, old, old, None, batch, jnp.float32(0))
    for leaf in jax.tree.leaves(gradient):
        assert float(jnp.abs(leaf).max()) < 1e-5
    assert float(metrics["old_distance"]) == 0
    for sign in (1, -1):
        other = {"a": old["a"], "b": old["b"] + 0.1 * sign}
        gradient, moved = run(other, old, old, None, batch, jnp.float32(0))
        assert float(moved["policy_loss"]) > float(metrics["policy_loss"])
        assert (np.sign(gradient["b"]) == sign).all()
        np.testing.assert_allclose(moved["old_distance"], 0.01, rtol=1e-4)


def test_penalty_is_the_squared_difference_to_the_reference_and_pulls_toward_it():
    old = start("v_prediction")
    reference = {"a": old["a"], "b": old["b"] + 0.2}
    batch = data(64, lambda x0: np.zeros(len(x0)))
    config = NFTConfig(penalty=True, microbatch=16)
    run = make_nft_gradient(compile_nft(network, config, ABAR))
    gradient, metrics = run(old, old, reference, None, batch, jnp.float32(3.0))
    np.testing.assert_allclose(metrics["kl"], 0.04, rtol=1e-5)
    want = metrics["policy_loss"] + 3 * metrics["kl"]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    # ∂/∂b of β (b − b_ref)², a fifth of the timesteps each
    np.testing.assert_allclose(gradient["b"], np.full(5, 3 * 2 * -0.2 / 5), rtol=1e-3)
    moved = {"a": old["a"], "b": old["b"] + 0.05}
    _, metrics = run(moved, old, reference, None, batch, jnp.float32(3.0))
    np.testing.assert_allclose(metrics["old_distance"], 0.05**2, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], 0.15**2, rtol=1e-4)


def test_microbatches_and_order_do_not_change_the_gradient():
    old = start("v_prediction")
    moved = jax.tree.map(lambda x: x + 0.05, old)
    batch = data(12, sum_of_pixels)
    results = []
    for size in (4, 12):
        run = make_nft_gradient(compile_nft(network, NFTConfig(microbatch=size), ABAR))
        results.append(run(moved, old, old, None, batch, jnp.float32(0)))
    run = make_nft_gradient(compile_nft(network, NFTConfig(microbatch=12), ABAR))
    results.append(run(moved, old, old, None, batch.take(np.arange(12)[::-1]), jnp.float32(0)))
    for gradient, metrics in results[1:]:
        for a, b in zip(*map(jax.tree.leaves, (gradient, results[0][0])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-5)


def test_images_are_noised_to_their_timesteps_with_their_keys():
    seen = []

    def recording(params, frozen):
        def denoise(x, t, condition):
            jax.debug.callback(lambda x, t: seen.append((np.array(x), np.array(t))), x, t)
            return params["a"][0] * x

        return denoise

    batch = data(2, sum_of_pixels)
    run = make_nft_gradient(compile_nft(recording, NFTConfig(microbatch=2), ABAR))
    old = {"a": jnp.ones(1)}
    jax.block_until_ready(run(old, old, old, None, batch, jnp.float32(0)))
    jax.effects_barrier()
    for j, t in enumerate(np.asarray(STEPS)):
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(batch.keys, j)
        want = add_noise(ABAR, batch.x0, initial_noise(keys, SHAPE), jnp.int32(int(t)))
        found = [x for x, at in seen if (at == t).all()]
        assert found
        for x in found:
            np.testing.assert_allclose(x, want, atol=1e-6)
