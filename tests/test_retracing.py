"""A run compiles in its first iterations and never after; another in the process not at all."""

import jax
import pytest
from compilations import compilations
from tiny_run import config
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo import train as run

ITERATIONS = 5
CHOICES = {
    "a sliding window and a KL": {
        "rollout__num_steps": 4,
        "rollout__window_size": 2,
        "rollout__window_every": 1,
        "grpo__beta": 0.1,
        "grpo__updates_per_rollout": 2,
    },
    "drawn steps": {"rollout__num_steps": 4, "grpo__gradient_steps": 2},
    "nft": {"grpo__algorithm": "nft", "grpo__kl": "mse", "grpo__beta": 0.1, "nft__timesteps": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("retracing") / "pipeline", **TWO_LEVELS)


@pytest.mark.parametrize(
    "choice",
    [pytest.param(c, marks=[pytest.mark.slow] * (c in ("drawn steps", "nft"))) for c in CHOICES],
)
def test_nothing_is_compiled_after_the_second_iteration(checkpoint, tmp_path, monkeypatch, choice):
    at_iteration = []
    original = run.update_metrics

    def count(updates):
        at_iteration.append(len(compiled))
        return original(updates)

    monkeypatch.setattr(run, "update_metrics", count)
    changed = {"run__iterations": ITERATIONS, "eval__every": 2, "eval__keep_best": False}
    changed |= CHOICES[choice]
    jax.clear_caches()
    with compilations() as compiled:
        run.train(config(checkpoint, tmp_path, **changed), quiet=True)
    assert len(at_iteration) == ITERATIONS
    assert at_iteration[0] > 5  # sampling, decoding and the update, at least
    assert at_iteration[2:] == [at_iteration[1]] * 3, compiled[at_iteration[1] :]
    changed |= {"run__seed": 1, "run__output": tmp_path / "again"}
    with compilations() as compiled:
        run.train(config(checkpoint, tmp_path, **changed), quiet=True)
    assert compiled == []
