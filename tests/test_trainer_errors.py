"""What `GRPOTrainer` refuses, and that a refused step changes nothing."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small_policies import ALONE, Categorical, Gaussian, make_batch, parameters

from diffusion_grpo.errors import UsageError
from diffusion_grpo.trainer import GRPOConfig, GRPOTrainer


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
