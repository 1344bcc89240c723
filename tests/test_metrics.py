import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo.errors import UsageError
from diffusion_grpo.metrics import MetricsLog, Progress, read_metrics


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_what_is_written_is_read_back_from_scalars_of_any_library(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(0, {"reward/mean": 0.5, "clipped": np.int64(3), "kl": np.float32(0.25)})
        log.write(1, {"loss": jnp.float32(-1.5), "grad_norm": jnp.bfloat16(2.0)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": 0, "reward/mean": 0.5, "clipped": 3, "kl": 0.25},
        {"iteration": 1, "loss": -1.5, "grad_norm": 2.0},
    ]


def test_every_line_is_on_disk_before_the_next_one(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    for iteration in range(3):
        log.write(iteration, {"kl": 0.0})
        assert len(read_metrics(tmp_path)) == iteration + 1
    log.close()
    log.close()


def test_lines_stay_valid_json_when_values_are_not_finite(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(4, {"a": math.nan, "b": np.float32(np.inf), "c": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse_constant) == {
        "iteration": 4,
        "a": "nan",
        "b": "inf",
        "c": "-inf",
    }
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


@pytest.mark.parametrize("value", [np.zeros(2), "0.5", None, 1j])
def test_what_is_not_one_number_is_refused_by_name_and_nothing_is_written(tmp_path, value) -> None:
    with MetricsLog(tmp_path) as log:
        with pytest.raises(TypeError, match="metric 'reward/mean' is .* expected one number"):
            log.write(0, {"kl": 0.0, "reward/mean": value})
    assert read_metrics(tmp_path) == []


def test_a_metric_must_not_take_the_place_of_the_iteration(tmp_path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="named 'iteration'"):
        log.write(0, {"iteration": 1})


def test_a_last_line_cut_short_is_left_out_and_dropped_when_the_log_is_reopened(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "kl": 0.1}\n{"iteration": 1, "k')
    assert [row["iteration"] for row in read_metrics(path)] == [0]
    with MetricsLog(tmp_path) as log:
        log.write(1, {"kl": 0.2})
    assert read_metrics(path) == [{"iteration": 0, "kl": 0.1}, {"iteration": 1, "kl": 0.2}]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "kl": 0.1}')
    with MetricsLog(tmp_path) as log:
        log.write(1, {})
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1]


def test_a_broken_line_before_the_last_is_an_error_with_its_number(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iter\n{"iteration": 2}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2 is broken"):
        read_metrics(path)
    path.write_text('{"iteration": 0}\n[1]\n')
    with pytest.raises(UsageError, match="line 2 is broken: not an object with an iteration"):
        MetricsLog(tmp_path)


def test_a_missing_file_or_directory_is_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="no metrics file at .*expected a run directory's"):
        read_metrics(tmp_path / "nothing")
    with pytest.raises(UsageError, match="nothing' does not exist: create it first"):
        MetricsLog(tmp_path / "nothing")


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        for iteration in range(5):
            log.write(iteration, {"kl": math.nan if iteration == 1 else 0.5})
        log.write(1, {"eval/reward/mean": 2.0})
        log.truncate_after(2)
        log.write(3, {"kl": 0.75})
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 1, 3]
    assert math.isnan(rows[1]["kl"]) and rows[-1]["kl"] == 0.75
    with MetricsLog(tmp_path) as log:
        log.truncate_after(-1)
    assert read_metrics(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


METRICS = {"reward/mean": np.float32(0.27), "kl": 0.0012, "images_per_second": 3.44}


def test_without_a_terminal_lines_come_at_an_interval_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, interval=10.0, stream=stream, clock=clock) as progress:
        for done in range(1, 101):
            clock.now += 3.0
            progress.update(done, METRICS)
    lines = stream.getvalue().splitlines()
    # The first, then every fourth (the first after 10 s), and the last.
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(1, 98, 4), 100]
    assert lines[0] == "iteration 1/100  reward 0.2700  KL 1.20e-03  3.44 images/s  0:04:57 left"
    assert lines[-1].endswith("0:00:00 left")


def test_time_left_is_not_spoiled_by_the_compilation_in_the_first_iteration() -> None:
    clock = Clock()
    with Progress(1000, stream=io.StringIO(), clock=clock) as progress:
        assert progress.seconds_left() is None
        for done in range(1, 11):
            clock.now += 600.0 if done == 1 else 2.0
            progress.update(done, {})
    assert progress.seconds_left() == 990 * 2.0


def test_time_left_of_a_resumed_run_counts_only_what_remains() -> None:
    clock = Clock()
    with Progress(100, start=90, stream=io.StringIO(), clock=clock) as progress:
        clock.now = 5.0
        progress.update(91, {})
    assert progress.seconds_left() == 9 * 5.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_the_same_and_messages_go_above_it(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with Progress(4, stream=stream, clock=clock) as progress:
        for done in range(1, 5):
            clock.now += 1.0
            progress.update(done, METRICS)
        progress.message("saved [checkpoint] :fire: 4")
    shown = stream.getvalue()
    assert "iteration 4/4" in shown and "reward 0.2700  KL 1.20e-03  3.44 images/s" in shown
    assert "saved [checkpoint] :fire: 4\n" in shown


def test_quiet_shows_nothing_and_verbose_every_iteration() -> None:
    quiet, verbose = Terminal(), io.StringIO()
    for stream, options in ((quiet, {"quiet": True}), (verbose, {"verbose": True})):
        with Progress(5, stream=stream, clock=Clock(), **options) as progress:
            for done in range(1, 6):
                progress.update(done, METRICS)
            progress.message("saved")
    assert quiet.getvalue() == ""
    assert [line.split()[1] for line in verbose.getvalue().splitlines()[:5]] == [
        f"{done}/5" for done in range(1, 6)
    ]
