"""`GRPOTrainer`: its loss and gradient against PyTorch, and what a step changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from compilations import compilations
from flax import nnx
from small_policies import ALONE, KINDS, Categorical, Gaussian, make_batch, parameters

from diffusion_grpo.errors import UsageError
from diffusion_grpo.policies import sampled_entropy
from diffusion_grpo.trainer import GRPOConfig, GRPOTrainer


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
    trainer.train_step(batches[0])
    with compilations() as compiled:
        for batch in batches[1:]:
            trainer.train_step(batch)
    assert not compiled
    assert Categorical.traces == traces + 2  # the policy and the reference
    with compilations() as compiled:
        trainer.train_step(batches[0] | {"group_size": 3})
    assert len(compiled) == 1 and Categorical.traces == traces + 4


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
