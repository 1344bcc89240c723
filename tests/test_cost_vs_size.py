"""The script that measures how an iteration's cost grows: its fit, its table, its runs' flags."""

import pytest
from scripts import FOLDER, load_script

from diffusion_grpo.config import load_config, to_yaml

cost_vs_size = load_script("cost_vs_size")


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_the_exponent_of_a_power_is_found(power):
    times = {size: 0.3 * size**power for size in (4, 8, 16)}
    assert cost_vs_size.exponent(times) == pytest.approx(power, abs=1e-12)


def test_a_table_has_a_line_for_what_grows():
    lines = cost_vs_size.to_table({"steps": {5: 1.0, 10: 2.0}, "devices": {1: 3.0}}).splitlines()
    assert lines[2:] == ["| steps | 5: 1.00; 10: 2.00 | 1.00 |", "| devices | 1: 3.00 |  |"]


def _grown(config):
    """What grows, in the order of the lines."""
    rollout, options = config.rollout, config.grpo
    return [
        {rollout.images_per_prompt},
        {rollout.prompts_per_iteration},
        {rollout.num_steps, rollout.window_size + 2},
        {rollout.microbatch, options.microbatch},
        {config.mesh.data},
    ]


@pytest.mark.parametrize("line", range(len(cost_vs_size.SIZES)))
def test_every_size_is_a_run_that_learns_from_all_of_its_images(line):
    name = list(cost_vs_size.SIZES)[line]
    start = _grown(load_config("demo", [*cost_vs_size.FLAGS]))
    for size, flags in cost_vs_size.SIZES[name].items():
        config = load_config("demo", [*cost_vs_size.FLAGS, *flags])
        config.validate()
        assert config.grpo.best_and_worst is None
        assert config.rollout.num_images % config.grpo.microbatch == 0
        grown = _grown(config)
        assert grown[line] == {size}
        assert [g for i, g in enumerate(grown) if i != line] == start[:line] + start[line + 1 :]


def test_the_record_is_of_the_flags_that_are_run():
    made = {"flags": list(cost_vs_size.FLAGS), "iterations": 7}
    record = cost_vs_size.load_record(FOLDER / "cost_vs_size.json", made)
    assert {name: list(times) for name, times in record.items()} == {
        name: list(sizes) for name, sizes in cost_vs_size.SIZES.items()
    }
    with pytest.raises(SystemExit, match="holds runs with the iterations 7, and these have 9"):
        cost_vs_size.load_record(FOLDER / "cost_vs_size.json", made | {"iterations": 9})


def test_a_finished_run_is_reused_an_unfinished_one_begun_anew_and_another_refused(
    tmp_path, monkeypatch
):
    begun = []

    def train(command, *, check, env):
        assert not (tmp_path / "run").exists() and check
        begun.append(env["XLA_FLAGS"].split("=")[-1])
        (tmp_path / "run").mkdir()
        config = load_config("demo", command[command.index("demo") + 1 :])
        (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))

    monkeypatch.setattr(cost_vs_size.subprocess, "run", train)
    words = [*cost_vs_size.FLAGS, "--iterations", "3"]
    cost_vs_size.run(tmp_path / "run", words, 4)
    cost_vs_size.run(tmp_path / "run", words, 4)
    assert begun == ["4", "4"]
    (tmp_path / "run" / "evaluation.json").touch()
    cost_vs_size.run(tmp_path / "run", words, 4)
    assert begun == ["4", "4"]
    with pytest.raises(SystemExit, match="holds a run with other flags"):
        cost_vs_size.run(tmp_path / "run", [*words, "--iterations", "4"], 4)
    times = [9.0, 8.0, 1.0, 3.0, 2.0]
    rows = "".join(f'{{"time/iteration": {time}}}\n' for time in times)
    (tmp_path / "run" / "metrics.jsonl").write_text(rows)
    assert cost_vs_size.seconds(tmp_path / "run") == 2.0
