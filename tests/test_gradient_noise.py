"""The script that measures how much of a gradient is signal: its estimate, and a real call."""

import json
import re
import sys

import numpy as np
import pytest
from scripts import load_script
from tiny_run import flags
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.config import load_config

gradient_noise = load_script("gradient_noise")


@pytest.mark.parametrize("ratio", [0.0, 0.1, 2.0])
def test_the_ratio_of_a_known_signal_in_known_noise_is_found(ratio):
    rng = np.random.default_rng(0)
    size, count = 20000, 40
    signal = rng.normal(size=size)
    signal *= np.sqrt(ratio * size) / np.linalg.norm(signal)
    drawn = (signal + rng.normal(size=(count, size))).astype(np.float32)
    # noise of 20000 elements, 780 pairs: the estimate's own error is 1/√(780 · 20000/2) at ratio 0
    assert gradient_noise.signal_to_noise(drawn) == pytest.approx(ratio, rel=0.03, abs=2e-3)


def test_elements_count_alike_whatever_their_size():
    rng = np.random.default_rng(1)
    drawn = 0.5 + rng.normal(size=(30, 5000))
    drawn[:, 0] = 0
    scaled = (drawn * np.geomspace(1e-6, 1, 5000)).astype(np.float32)
    plain = gradient_noise.signal_to_noise(gradient_noise.by_element(drawn))
    assert gradient_noise.signal_to_noise(gradient_noise.by_element(scaled)) == pytest.approx(
        plain, rel=1e-3
    )


def test_its_commands_are_ones_that_there_are():
    lines = re.findall(
        r"^    python benchmarks/gradient_noise.py (.*)$",
        gradient_noise.__doc__.replace("\\\n", ""),
        re.MULTILINE,
    )
    assert len(lines) == 2
    for line in lines:
        preset, *words = line.replace("--gradients 28", "").split()
        load_config(preset, words)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_it_measures_a_run_s_configuration(algorithm, tmp_path, monkeypatch, capsys):
    words = flags(
        write_pipeline(tmp_path / "pipeline", **TWO_LEVELS),
        tmp_path,
        grpo__algorithm=algorithm,
        grpo__kl="exact" if algorithm == "grpo" else "mse",
        nft__timesteps=1,
        rollout__window_size=1,
        grpo__step_weights="uniform",
        grpo__best_and_worst=None,
        reward__rewards="brightness",
    )
    monkeypatch.setattr(
        sys, "argv", ["gradient_noise.py", "demo", "--gradients", "2", "--json", *words]
    )
    gradient_noise.main()
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 8 and found["gradients"] == 2 and found["seconds"] > 0
    assert np.isfinite([found["signal_to_noise"], found["signal_to_noise_by_element"]]).all()
    assert not (tmp_path / "run").exists()
