"""Policies of a few numbers for `GRPOTrainer`, and batches of their actions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.trainer import GRPOConfig

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
