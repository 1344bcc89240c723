import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.policies import sampled_entropy
from diffusion_grpo.trainer import GRPOConfig, GRPOTrainer

README = Path(__file__).parents[1] / "README.md"
ALONE = GRPOConfig(beta=0.0)  # needs no reference


class Categorical(nnx.Module):
    """Logits [B, 5] for states [B, 3]; [B, L, 5] for [B, L, 3]."""

    traces = 0

    def __init__(self, seed=0):
        self.linear = nnx.Linear(3, 5, rngs=nnx.Rngs(seed))

    def __call__(self, states):
        type(self).traces += 1
        return self.linear(states)


class Gaussian(nnx.Module):
    """N(mean(s), σ²) over 2 numbers, without a closed entropy."""

    def __init__(self, seed=0):
        self.mean = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        self.log_std = nnx.Param(jnp.asarray([-0.3, 0.1]))

    def log_prob(self, states, actions):
        mean = self.mean(states)
        std = jnp.broadcast_to(jnp.exp(self.log_std[...]), mean.shape)
        return jax.scipy.stats.norm.logpdf(actions, mean, std).sum(axis=1)


class GaussianWithEntropy(Gaussian):
    def entropy(self, states):
        entropy = (self.log_std[...] + 0.5 * np.log(2 * np.pi * np.e)).sum()
        return jnp.broadcast_to(entropy, states.shape[:1])


def parameters(model):
    return {"/".join(map(str, k)): np.asarray(v) for k, v in nnx.to_flat_state(state(model))}


def state(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def torch_distribution(kind, parameters, states):
    if kind.startswith("gaussian"):
        mean = states @ parameters["mean/kernel"] + parameters["mean/bias"]
        return torch.distributions.Normal(mean, parameters["log_std"].exp().expand_as(mean))
    logits = states @ parameters["linear/kernel"] + parameters["linear/bias"]
    return torch.distributions.Categorical(logits=logits)


def torch_loss(kind, config, parameters, reference, batch, size):
    """GRPO after its paper, in float64."""
    states, actions = torch.tensor(batch["states"]).double(), torch.tensor(batch["actions"])
    policy = torch_distribution(kind, parameters, states)

    def total(x):
        return x.reshape(len(x), -1).sum(1)

    log_prob = total(policy.log_prob(actions))
    old = torch.tensor(batch["old_log_probs"]).double()
    ratio = (log_prob - old).exp()
    rewards = torch.tensor(batch["rewards"]).double()
    if rewards.ndim == 2:
        rewards = sum(config.gamma**i * rewards[:, i] for i in range(rewards.shape[1]))
    groups = rewards.reshape(-1, size)
    centered = groups - groups.mean(1, keepdim=True)
    advantages = (centered / groups.std(1, keepdim=True, correction=0)).reshape(-1)
    bounded = ratio.clamp(1 - config.clip_param, 1 + config.clip_param)
    surrogate = -torch.minimum(ratio * advantages, bounded * advantages).mean()
    clipped = ((bounded - ratio) * advantages < 0).double().mean()
    if kind == "gaussian":  # the estimator, the gradient of which is −ρ (log π − b) ∇ log π
        others = torch.stack([torch.cat([old[:i], old[i + 1 :]]).mean() for i in range(len(old))])
        weight = (ratio * (log_prob - others)).detach()
        value = -ratio * (log_prob - others - 1) - others - 1
        entropy = (value.detach() - weight * (log_prob - log_prob.detach())).mean()
    else:
        entropy = total(policy.entropy()).mean()
    kl = torch.zeros(())
    if reference is not None:
        delta = log_prob - total(torch_distribution(kind, reference, states).log_prob(actions))
        kl = ((-delta).exp() - 1 + delta).mean()
    loss = surrogate + config.beta * kl - config.entropy_coeff * entropy
    return loss, {
        "policy_loss": surrogate,
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "kl_penalty": config.beta * kl,
        "entropy": entropy,
        "clip_fraction": clipped,
        "ratio_mean": ratio.mean(),
    }


KINDS = {
    "categorical": Categorical,
    "sequence": Categorical,
    "gaussian": Gaussian,
    "gaussian with entropy": GaussianWithEntropy,
}


def make_batch(kind="categorical", count=12, seed=0):
    rng = np.random.default_rng(seed)
    model = KINDS[kind]()
    axes = (count, 4) if kind == "sequence" else (count,)
    states = rng.normal(size=(*axes, 3)).astype(np.float32)
    if kind.startswith("gaussian"):
        actions = rng.normal(size=(count, 2)).astype(np.float32)
        log_probs = np.asarray(model.log_prob(jnp.asarray(states), jnp.asarray(actions)))
    else:
        actions = rng.integers(0, 5, axes)
        table = np.asarray(jax.nn.log_softmax(model(jnp.asarray(states))))
        log_probs = np.take_along_axis(table, actions[..., None], -1).reshape(count, -1).sum(1)
    # Old log-probs on both sides of the new, some beyond the clip range
    old = log_probs + rng.normal(0, 0.3, count)
    rewards = rng.normal(size=(count, 4) if kind == "sequence" else count)
    return {
        "states": states,
        "actions": actions,
        "old_log_probs": old.astype(np.float32),
        "rewards": rewards.astype(np.float32),
    }


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_metrics_and_gradient_agree_with_torch(kind, with_reference):
    config = GRPOConfig(beta=0.3 if with_reference else 0.0, entropy_coeff=0.2, gamma=0.7)
    model, reference = KINDS[kind](), KINDS[kind](seed=1) if with_reference else None
    before, batch = parameters(model), make_batch(kind)
    trainer = GRPOTrainer(model, optax.sgd(1.0), config, reference)
    expected_loss, metrics = trainer.compute_loss(**batch)
    loss, stepped = trainer.train_step(batch)
    assert loss == expected_loss and stepped == metrics

    def leaves(values):
        return {k: torch.tensor(v).double().requires_grad_() for k, v in values.items()}

    theta = leaves(before)
    frozen = leaves(parameters(reference)) if with_reference else None
    torch_value, torch_metrics = torch_loss(kind, config, theta, frozen, batch, 4)
    torch_value.backward()
    assert float(loss) == pytest.approx(torch_value.item(), rel=1e-4, abs=1e-6)
    assert set(metrics) == set(torch_metrics)
    for name, value in torch_metrics.items():
        assert float(metrics[name]) == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert 0 < float(metrics["clip_fraction"]) < 1
    for name, after in parameters(model).items():
        gradient = theta[name].grad.numpy()
        np.testing.assert_allclose(before[name] - after, gradient, rtol=1e-3, atol=2e-6)
        assert np.abs(gradient).max() > 1e-3


def test_ref_log_probs_in_the_batch_stand_for_the_reference_model():
    batch, reference = make_batch(), Categorical(seed=1)
    table = np.asarray(jax.nn.log_softmax(reference(jnp.asarray(batch["states"]))))
    given = table[np.arange(12), batch["actions"]]
    by_model = GRPOTrainer(Categorical(), optax.sgd(1.0), GRPOConfig(), reference)
    by_batch = GRPOTrainer(Categorical(), optax.sgd(1.0), GRPOConfig())
    loss, metrics = by_model.train_step(batch)
    loss2, metrics2 = by_batch.train_step(batch | {"ref_log_probs": given})
    assert float(metrics["kl_penalty"]) > 1e-4
    assert float(loss2) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics2["kl_penalty"]) == pytest.approx(float(metrics["kl_penalty"]), rel=1e-4)


def test_no_gradient_reaches_the_reference():
    reference = Categorical(seed=1)
    trainer = GRPOTrainer(Categorical(), optax.sgd(1.0), GRPOConfig(beta=10.0), reference)
    batch, size = trainer._samples(*make_batch().values(), None, group_size=None)
    _, params, rest = trainer._split()

    def loss(params, frozen):
        return trainer._loss(size, params, rest, frozen, batch)[0]

    gradient, frozen = jax.grad(loss, argnums=(0, 1))(params, trainer._reference)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(frozen))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_the_model_itself_as_reference_stays_as_it_was():
    model = Categorical()
    trainer = GRPOTrainer(model, optax.sgd(0.5), GRPOConfig(beta=1.0), model)
    frozen, start = jax.tree.map(np.asarray, trainer._reference), parameters(model)
    assert float(trainer.train_step(make_batch())[1]["kl_penalty"]) == pytest.approx(0, abs=1e-6)
    assert float(trainer.train_step(make_batch())[1]["kl_penalty"]) > 1e-4
    for a, b in zip(jax.tree.leaves(trainer._reference), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all((parameters(model)[name] != start[name]).any() for name in start)


def test_normalized_rewards_are_the_group_advantages():
    trainer = GRPOTrainer(Categorical(), optax.sgd(1.0), ALONE)
    rewards = np.array([1.0, 2.0, 6.0, 5.7, 5.7, 5.7])
    expected = (rewards[:3] - 3) / rewards[:3].std()
    ours = trainer.normalize_group_rewards(rewards, 3)
    np.testing.assert_allclose(ours[:3], expected, rtol=1e-6)
    assert (ours[3:] == 0).all()
    halved = trainer.normalize_group_rewards(rewards, 3, eps=float(rewards[:3].std()))
    np.testing.assert_allclose(halved[:3], expected / 2, rtol=1e-6)
    with pytest.raises(UsageError, match=r"expected \[B\]"):
        trainer.normalize_group_rewards(rewards.reshape(2, 3), 3)
    with pytest.raises(UsageError, match="do not divide"):
        trainer.normalize_group_rewards(rewards, 4)


def test_sampled_entropy_is_unbiased_in_value_and_gradient():
    # Against the closed form, over every pair of actions of a 4-way distribution, off policy.
    logits = jnp.asarray([0.3, -0.5, 1.0, 0.1])
    old = jax.nn.log_softmax(jnp.asarray([0.0, 0.2, 0.4, -0.3]))

    def expectation(logits):
        log_probs, total = jax.nn.log_softmax(logits), 0.0
        for i in range(4):
            for j in range(4):
                pair = jnp.asarray([i, j])
                estimate = sampled_entropy(log_probs[pair], old[pair]).mean()
                total = total + jnp.exp(old[i] + old[j]) * estimate
        return total

    theta = torch.tensor(np.asarray(logits, np.float64), requires_grad=True)
    exact = torch.distributions.Categorical(logits=theta).entropy()
    exact.backward()
    value, gradient = jax.value_and_grad(expectation)(logits)
    assert float(value) == pytest.approx(exact.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, theta.grad.numpy(), atol=1e-6)


def test_both_namings_of_a_batch_are_one():
    batch = make_batch()
    aliased = {
        {"states": "observations", "old_log_probs": "log_probs"}.get(k, k): v
        for k, v in batch.items()
    }
    losses = [
        GRPOTrainer(Categorical(), optax.sgd(1.0), ALONE).train_step(b)[0] for b in (batch, aliased)
    ]
    assert losses[0] == losses[1]


def test_num_generations_is_used_unless_the_batch_has_its_own_group_size():
    def loss(num_generations, **extra):
        config = GRPOConfig(num_generations=num_generations, beta=0.0)
        trainer = GRPOTrainer(Categorical(), optax.sgd(1.0), config)
        return float(trainer.train_step(make_batch() | extra)[0])

    assert loss(3) != loss(4)
    assert loss(4, group_size=3) == loss(3)
    assert loss(5, group_size=np.int64(3)) == loss(3)
    with pytest.raises(UsageError, match="12 samples.*num_generations = 5.*group_size"):
        loss(5)
    for wrong in (1, 0, -2, 5, 2.5, "3"):
        with pytest.raises(UsageError, match="group_size"):
            loss(4, group_size=wrong)


def test_steps_compile_once():
    trainer = GRPOTrainer(Categorical(), optax.adam(1e-2), GRPOConfig(), Categorical())
    batches = [make_batch(seed=seed) for seed in range(5)]
    traces = Categorical.traces
    for batch in batches:
        trainer.train_step(batch)
    assert Categorical.traces == traces + 2  # the policy and the reference
    assert trainer._step._cache_size() == 1
    trainer.train_step(batches[0] | {"group_size": 3})
    assert trainer._step._cache_size() == 2


def test_optax_and_nnx_optimizers_take_the_same_steps():
    losses, models = [], []
    for wrap in (lambda m, tx: tx, lambda m, tx: nnx.Optimizer(m, tx, wrt=nnx.Param)):
        model = Categorical()
        optimizer = wrap(model, optax.adam(1e-2))
        trainer = GRPOTrainer(model, optimizer, ALONE)
        losses.append([float(trainer.train_step(make_batch())[0]) for _ in range(3)])
        models.append(parameters(model))
        assert int(trainer.optimizer.step[...]) == 3
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    for name in models[0]:
        np.testing.assert_array_equal(models[0][name], models[1][name])
    # Adam after Kingma and Ba, in torch, from the gradients of torch_loss
    theta = {
        k: torch.tensor(v).double().requires_grad_()
        for k, v in parameters(KINDS["categorical"]()).items()
    }
    adam = torch.optim.Adam(theta.values(), lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        torch_loss("categorical", ALONE, theta, None, make_batch(), 4)[0].backward()
        adam.step()
    for name in theta:
        np.testing.assert_allclose(models[0][name], theta[name].detach().numpy(), atol=1e-4)


def test_only_what_the_optimizer_names_is_trained():
    model = Gaussian()
    before = parameters(model)
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.PathContains("log_std"))
    GRPOTrainer(model, optimizer, ALONE).train_step(make_batch("gaussian"))
    after = parameters(model)
    assert {name for name in after if (after[name] != before[name]).any()} == {"log_std"}


def test_state_beside_the_parameters_is_kept():
    class Counting(Categorical):
        def __init__(self):
            super().__init__()
            self.calls = nnx.Variable(jnp.asarray(0))

        def __call__(self, states):
            self.calls[...] += 1
            return super().__call__(states)

    model = Counting()
    trainer = GRPOTrainer(model, optax.sgd(1.0), ALONE)
    trainer.compute_loss(**make_batch())
    assert int(model.calls[...]) == 0
    trainer.train_step(make_batch())
    trainer.train_step(make_batch())
    assert int(model.calls[...]) == 2


def test_states_may_be_a_pytree_and_lists_are_arrays():
    class Nested(Categorical):
        def __call__(self, states):
            return super().__call__(states["a"] + states["b"])

    batch = make_batch()
    expected = GRPOTrainer(Categorical(), optax.sgd(1.0), ALONE).train_step(batch)[0]
    nested = {"a": batch["states"] / 2, "b": batch["states"] / 2}
    loss, _ = GRPOTrainer(Nested(), optax.sgd(1.0), ALONE).train_step(batch | {"states": nested})
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    lists = {name: value.tolist() for name, value in batch.items()}
    loss, _ = GRPOTrainer(Categorical(), optax.sgd(1.0), ALONE).train_step(lists)
    assert float(loss) == float(expected)


def test_a_masked_action_has_no_part():
    class Masked(Categorical):
        def __call__(self, states):
            logits = super().__call__(states)
            return logits.at[:, 4].set(-jnp.inf)

    model, batch = Masked(), make_batch()
    batch["actions"] = batch["actions"] % 4
    _, metrics = GRPOTrainer(model, optax.sgd(1.0), ALONE).train_step(batch)
    logits = np.asarray(Categorical()(jnp.asarray(batch["states"])))[:, :4]
    entropy = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy().mean()
    assert float(metrics["entropy"]) == pytest.approx(entropy.item(), rel=1e-5)
    assert all(np.isfinite(value).all() for value in parameters(model).values())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_generations": 1}, "num_generations is 1"),
        ({"clip_param": 0.0}, "clip_param is 0.0"),
        ({"clip_param": 1.0}, "clip_param is 1.0"),
        ({"clip_param": float("nan")}, "clip_param is nan"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"entropy_coeff": -1.0}, "entropy_coeff is -1.0"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"gamma": -0.1}, "gamma is -0.1"),
    ],
)
def test_config_rejects_nonsense(wrong, named):
    with pytest.raises(UsageError, match=named):
        GRPOConfig(**wrong)


def test_defaults():
    config = GRPOConfig()
    assert (config.num_generations, config.clip_param, config.beta) == (4, 0.2, 0.01)
    assert (config.entropy_coeff, config.gamma) == (0.01, 0.99)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rewards": None}, "has no rewards"),
        ({"observations": np.zeros((12, 3))}, "both 'states' and its alias 'observations'"),
        ({"log_probs": np.zeros(12)}, "both 'old_log_probs' and its alias 'log_probs'"),
        ({"ref_logprobs": np.zeros(12)}, "did you mean 'ref_log_probs'"),
        ({"rewards": np.zeros(11)}, r"expected \[11, ...\]"),
        ({"rewards": np.zeros((12, 2, 2))}, r"rewards are \(12, 2, 2\)"),
        ({"rewards": np.zeros(0)}, r"rewards are \(0,\)"),
        ({"rewards": ["high"] * 12}, "rewards: expected an array of numbers"),
        ({"rewards": np.zeros(12, np.complex64)}, "expected real numbers"),
        ({"old_log_probs": np.zeros((12, 4))}, r"old_log_probs are \(12, 4\)"),
        ({"ref_log_probs": np.zeros(11)}, r"ref_log_probs are \(11,\)"),
        ({"states": np.zeros((4, 3), np.float32)}, r"states are \(4, 3\)"),
        ({"actions": np.zeros(12)}, r"actions are float32.*log_prob"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error_before_compilation(change, named):
    trainer = GRPOTrainer(Categorical(), optax.sgd(1.0), ALONE)
    batch = {k: v for k, v in (make_batch() | change).items() if v is not None}
    with pytest.raises(UsageError, match=named):
        trainer.train_step(batch)
    assert trainer._step._cache_size() == 0


def test_a_kl_without_a_reference_is_an_error_that_names_the_mends():
    trainer = GRPOTrainer(Categorical(), optax.sgd(1.0))
    with pytest.raises(UsageError, match=r"reference_model=.*ref_log_probs.*beta=0"):
        trainer.train_step(make_batch())
    with pytest.raises(UsageError, match="beta is 0.01"):
        trainer.compute_loss(**make_batch())


def test_logits_that_do_not_fit_the_actions_are_an_error():
    trainer = GRPOTrainer(Categorical(), optax.sgd(1.0), ALONE)
    with pytest.raises(UsageError, match=r"returns \(12, 5\) for actions \(12, 1\)"):
        trainer.train_step(make_batch() | {"actions": np.zeros((12, 1), int)})

    class Tuple(Categorical):
        def __call__(self, states):
            return super().__call__(states), None

    with pytest.raises(UsageError, match="returns tuple"):
        GRPOTrainer(Tuple(), optax.sgd(1.0), ALONE).train_step(make_batch())


def test_a_policy_whose_log_prob_keeps_an_axis_is_an_error():
    class PerAxis(Gaussian):
        def log_prob(self, states, actions):
            return actions - self.mean(states)

    trainer = GRPOTrainer(PerAxis(), optax.sgd(1.0), ALONE)
    with pytest.raises(UsageError, match=r"log_prob\(states, actions\) returns \(12, 2\)"):
        trainer.train_step(make_batch("gaussian"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rewards": np.array([np.nan] + [0.0] * 11)}, "Not finite in the batch: rewards"),
        ({"actions": np.array([5] + [0] * 11)}, "actions outside"),
        ({"actions": np.array([-1] + [0] * 11)}, "actions outside"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(change, named):
    model = Categorical()
    trainer = GRPOTrainer(model, optax.adam(1e-2), ALONE)
    trainer.train_step(make_batch())
    before, optimizer = parameters(model), jax.tree.map(np.asarray, trainer._opt_state())
    with pytest.raises(FloatingPointError, match=f"step 1; nothing was changed.*{named}"):
        trainer.train_step(make_batch() | change)
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(value, before[name])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), trainer._opt_state(), optimizer)
    assert jax.tree.all(same)


def test_an_optimizer_of_another_model_is_an_error():
    optimizer = nnx.Optimizer(Gaussian(), optax.adam(1e-2), wrt=nnx.Param)
    with pytest.raises(UsageError, match="made of this model"):
        GRPOTrainer(Categorical(), optimizer, ALONE)


def test_a_categorical_policy_learns():
    rng = np.random.default_rng(0)
    model = Categorical()
    trainer = GRPOTrainer(model, optax.adam(3e-2), GRPOConfig(num_generations=8), model)
    logits_of, means = jax.jit(lambda x, p: x @ p["kernel"] + p["bias"][None]), []
    for _ in range(150):
        states = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 4)].repeat(8, axis=0)
        p = {"kernel": model.linear.kernel[...], "bias": model.linear.bias[...]}
        logits = np.asarray(logits_of(states, p))
        actions = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        log_probs = torch.log_softmax(torch.tensor(logits), 1).numpy()[np.arange(32), actions]
        rewards = (actions == states.argmax(1) + 1).astype(np.float32)
        trainer.train_step(
            {"states": states, "actions": actions, "log_probs": log_probs, "rewards": rewards}
        )
        means.append(rewards.mean())
    assert np.mean(means[:10]) < 0.4 and np.mean(means[-10:]) > 0.85


@pytest.mark.parametrize("kind", ["gaussian", "gaussian with entropy"])
def test_a_gaussian_policy_learns(kind):
    rng = np.random.default_rng(0)
    model, target = KINDS[kind](), np.array([[0.5, -1.0]] * 3, np.float32) * [[1], [2], [-1]]
    config = GRPOConfig(num_generations=8, beta=0.001, entropy_coeff=0.001)
    trainer = GRPOTrainer(model, optax.adam(3e-2), config, model)
    means = []
    for _ in range(200):
        state = rng.integers(0, 3, 4).repeat(8)
        states = np.eye(3, dtype=np.float32)[state]
        mean = states @ np.asarray(model.mean.kernel[...]) + np.asarray(model.mean.bias[...])
        std = np.exp(np.asarray(model.log_std[...]))
        actions = (mean + std * rng.normal(size=mean.shape)).astype(np.float32)
        log_probs = torch.distributions.Normal(torch.tensor(mean), torch.tensor(std).expand(32, 2))
        rewards = -np.square(actions - target[state]).sum(1)
        trainer.train_step(
            {
                "states": states,
                "actions": actions,
                "log_probs": log_probs.log_prob(torch.tensor(actions)).sum(1).numpy(),
                "rewards": rewards,
            }
        )
        means.append(rewards.mean())
    assert np.mean(means[:10]) < -2.5 and np.mean(means[-10:]) > -0.8


def run_alone(code, tmp_path):
    """Run code as a user does: an own process, no import hook, JAX as it comes."""
    env = os.environ | {"PYTHONPATH": str(README.parent), "PYTHONWARNINGS": "error"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_names_are_lazy_and_wrong_types_are_usage_errors(tmp_path):
    code = """
import sys, diffusion_grpo
assert not {"jax", "flax", "optax", "torch"} & set(sys.modules)
from diffusion_grpo import GRPOConfig, GRPOTrainer
from diffusion_grpo.grpo import GRPOConfig as config, GRPOTrainer as trainer
assert config is GRPOConfig and trainer is GRPOTrainer
for module in (diffusion_grpo, sys.modules["diffusion_grpo.grpo"]):
    assert not hasattr(module, "GRPOTrain")
import optax
from flax import nnx
class Empty(nnx.Module):
    def __call__(self, states): return states
linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
for arguments in (
    (None, optax.sgd(1.0)), (nnx.Dict(), optax.sgd(1.0)), (linear, "adam"),
    (linear, optax.sgd(1.0), {"beta": 0}), (linear, optax.sgd(1.0), config(), 3),
    (Empty(), optax.sgd(1.0)),
):
    try: GRPOTrainer(*arguments)
    except diffusion_grpo.errors.UsageError as error: print(error)
try: GRPOConfig(num_generations=4.0)
except diffusion_grpo.errors.UsageError as error: print(error)
"""
    starts = "model is NoneType", "model is Dict", "optimizer is str", "config is dict"
    starts += "reference_model is int", "model has no parameter", "num_generations is 4.0"
    lines = run_alone(code, tmp_path).splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def readme_example():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return next((block for block in blocks if "GRPOTrainer" in block), None)


def test_the_example_of_the_readme_learns(tmp_path):
    lines = run_alone(readme_example(), tmp_path).splitlines()
    assert len(lines) == 2
    for line in lines:
        start, *_, end = map(float, re.findall(r"-?\d+\.\d+", line))
        assert end > start + 0.3
    assert list(tmp_path.glob("*.png"))
