"""The comparison with PPO, at a tiny size: what is counted, and that it is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ppo_memory.py"


@pytest.mark.slow
def test_a_value_network_as_large_as_the_policy_doubles_what_is_held():
    words = ["--size", "tiny", "--dtype", "float32", "--steps", "4", "--json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=True
    )
    parts = json.loads(done.stdout)
    grpo, ppo = parts["grpo"], parts["ppo"]
    assert grpo["value parameters"] == 0
    assert ppo["value parameters"] == ppo["policy parameters"] > 0
    # gradient and AdamW's two moments, with a few counters
    each = grpo["policy parameters"]
    for kind in ("policy", "value"):
        held = ppo[f"{kind} gradient and optimizer state"]
        assert 3 * each <= held < 3 * each + 64
    # latents of 4 + 1 steps, 8 x 8 x 4 in float32, and a prompt of 77 tokens
    assert grpo["microbatch"] >= 5 * 8 * 8 * 4 * 4 + 77 * 16 * 4
    assert grpo["largest temporary"] > 0
    for total in (grpo, ppo):
        assert total["peak"] == sum(value for name, value in total.items() if name != "peak")
