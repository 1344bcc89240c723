"""Runs that are killed at any moment, and resumed, end as the undisturbed one."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_run import ITERATIONS
from tiny_run import lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.metrics import read_metrics

pytestmark = pytest.mark.slow

MOMENTS = ("sampling", "scoring", "update", "save")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("chaos") / "pipeline", **TWO_LEVELS)


def run(checkpoint, folder, moment="none", iteration=-1, number=signal.SIGKILL):
    """Train or go on; returns the exit code and what was said."""
    command = [sys.executable, str(Path(__file__).parent / "chaos_run.py"), checkpoint, folder]
    done = subprocess.run(
        [*map(str, command), moment, str(iteration), str(int(number))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = run(checkpoint, folder)
    assert code == 0, said
    return folder / "run"


def survive(checkpoint, folder, kills):
    for moment, iteration in kills:
        code, said = run(checkpoint, folder, moment, iteration)
        assert code == -signal.SIGKILL, said
    code, said = run(checkpoint, folder)
    assert code == 0, said


def test_a_killed_run_ends_as_the_undisturbed_one(checkpoint, undisturbed, tmp_path):
    survive(checkpoint, tmp_path, [("update", 1), ("save", 2)])
    assert lasting(tmp_path / "run") == lasting(undisturbed)


def test_a_run_killed_ten_times_ends_as_the_undisturbed_one(checkpoint, undisturbed, tmp_path):
    draw = random.Random(0)
    # A kill in a save may lose it, so that its iteration comes again: iterations never fall.
    iterations = sorted(draw.randrange(ITERATIONS) for _ in range(10))
    kills = [(draw.choice(MOMENTS[:3]), iteration) for iteration in iterations]
    kills[-1] = ("save", ITERATIONS - 1)
    survive(checkpoint, tmp_path, kills)
    assert lasting(tmp_path / "run") == lasting(undisturbed)


def test_a_preempted_run_repeats_no_finished_iteration(checkpoint, undisturbed, tmp_path):
    code, said = run(checkpoint, tmp_path, "scoring", 1, signal.SIGTERM)
    assert code == 75
    assert f"diffusion-grpo train --resume {tmp_path / 'run'}" in said
    run_of = tmp_path / "run"
    timed = read_metrics(run_of)
    assert [row["iteration"] for row in timed] == [0]  # the second is done anew
    code, said = run(checkpoint, tmp_path, "none", -1)
    assert code == 0, said
    # A repeated iteration would have taken another time.
    times = [[row["time/iteration"] for row in rows] for rows in (timed, read_metrics(run_of))]
    assert times[1][:1] == times[0]
    assert lasting(tmp_path / "run") == lasting(undisturbed)
