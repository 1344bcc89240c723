"""The script that measures how an iteration's cost grows: its fit, its table, its runs' flags."""

import pytest
from scripts import load_script

from diffusion_grpo.config import load_config

cost_vs_size = load_script("cost_vs_size")


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_the_exponent_of_a_power_is_found(power):
    times = {size: 0.3 * size**power for size in (4, 8, 16)}
    assert cost_vs_size.exponent(times) == pytest.approx(power, abs=1e-12)


def test_a_table_has_a_line_for_what_grows():
    lines = cost_vs_size.to_table({"steps": {5: 1.0, 10: 2.0}, "devices": {1: 3.0}}).splitlines()
    assert lines[2:] == ["| steps | 5: 1.00; 10: 2.00 | 1.00 |", "| devices | 1: 3.00 |  |"]


@pytest.mark.parametrize("name", [n for n in cost_vs_size.SIZES if n != cost_vs_size.DEVICES])
def test_every_size_is_a_run_that_learns_from_all_of_its_images(name):
    for size, flags in cost_vs_size.SIZES[name].items():
        config = load_config("demo", [*cost_vs_size.FLAGS, *flags])
        config.validate()
        rollout = config.rollout
        assert config.grpo.best_and_worst is None
        assert rollout.num_images % config.grpo.microbatch == 0
        grown = (
            rollout.images_per_prompt,
            rollout.prompts_per_iteration,
            rollout.num_steps,
            rollout.microbatch,
        )
        assert size in grown
