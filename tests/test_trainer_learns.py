"""`GRPOTrainer` as a user runs it: policies learn, alone and from the README."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
from small_policies import (
    KINDS,
    Categorical,
)

from diffusion_grpo.trainer import GRPOConfig, GRPOTrainer

README = Path(__file__).parents[1] / "README.md"


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
