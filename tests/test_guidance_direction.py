"""The script that tells how much of what was learned is guidance."""

import re
import sys

import numpy as np
import pytest
from scripts import load_script
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.pretrained import StableDiffusion

script = load_script("guidance_direction")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("direction") / "pipeline", **TWO_LEVELS)


def test_a_change_along_guidance_is_told_from_one_across():
    g, across = np.eye(4, dtype=np.float32)[:2].reshape(2, 2, 2)
    assert script.along(0.3 * g, g) == pytest.approx((1, 0.3))
    assert script.along(-2 * g + 2 * across, 4 * g) == pytest.approx((-(0.5**0.5), -0.5))
    assert script.along(0 * g, g) == (0, 0)


def test_guidance_itself_is_all_along_it(checkpoint):
    model = StableDiffusion.from_pretrained(checkpoint)
    for scale in (1.0, 1.3, 4.0):
        tuned = TrainablePolicy(model.unet, scale)
        changes = script.measure(
            model, tuned, ["a red circle", "two stars"], timesteps=[100, 900], num_steps=2
        )
        assert [change.timestep for change in changes] == [100, 900]
        for change in changes:
            assert change.guidance == pytest.approx(scale - 1, abs=1e-4)
            assert change.cosine == pytest.approx(np.sign(scale - 1), abs=1e-4)


def test_its_command_runs(checkpoint, monkeypatch, capsys):
    (line,) = re.findall(r"^    python benchmarks/(\S+) (.*)$", script.__doc__, re.MULTILINE)
    assert line == ("guidance_direction.py", "shapes-diffusion runs/demo")
    words = [str(checkpoint), str(checkpoint), "--num-prompts", "2", "--timesteps", "500"]
    monkeypatch.setattr(sys, "argv", ["guidance_direction.py", *words])
    script.main()
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["timestep", "500"]
    assert row.split()[-2:] == ["0.00", "(+0.00)"]
