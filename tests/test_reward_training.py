"""Rewards of every kind train the embedded model, and a reward that dies loses no iteration."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_servers import serving

from diffusion_grpo.cli import main
from diffusion_grpo.metrics import read_metrics
from diffusion_grpo.reward import wrap_reward
from diffusion_grpo.reward_server import RewardService

CONTRAST = '''"""Contrast: the standard deviation of all pixels."""

import numpy as np


def contrast(images, prompts, metadata):
    return images.std(axis=(1, 2, 3)) / 255
'''
TINY = """--model shapes-diffusion --model.lora-rank 2 --rollout.prompts-per-iteration 2
--grpo.best-and-worst None --rollout.images-per-prompt 2
--rollout.num-steps 2 --rollout.microbatch 2 --grpo.microbatch 4
--rollout.guidance-scale 1 --eval.num-prompts 2 --eval.num-steps 1 --run.iterations 2
--grpo.updates-per-rollout 1 --prompts.train shapes --prompts.heldout shapes_heldout
--run.sample-every 0""".split()


def train(output: Path, *words: str) -> int:
    return main(["train", *TINY, "--run.output", str(output), *words])


def installed(folder: Path) -> str:
    """Write a package with an entry point, as pip would install it; returns the reward's name."""
    (folder / "a_plugin.py").write_text(CONTRAST)
    info = folder / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    entry = "[diffusion_grpo.rewards]\nglow = a_plugin:contrast\n"
    (info / "entry_points.txt").write_text(entry)
    return "glow"


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if "time/" not in k and k != "images_per_second"}


@pytest.mark.slow
def test_every_kind_of_reward_trains_the_embedded_model_alike(tmp_path, monkeypatch) -> None:
    """A file, a function, an entry point and a server: the same iterations to the last bit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contrast.py").write_text(CONTRAST)
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("")
    (tmp_path / "a_package" / "scores.py").write_text(CONTRAST)
    monkeypatch.syspath_prepend(tmp_path)

    def contrast(images: Any, prompts: Any, metadata: Any) -> Any:
        return images.std(axis=(1, 2, 3)) / 255

    rows = {}
    with serving(RewardService(wrap_reward(contrast, name="contrast"))) as url:
        named = ("contrast.py", "a_package.scores:contrast", installed(tmp_path), url)
        for number, reward in enumerate(named):
            # each reward by itself, with a history: kept under the name that it has in the metrics
            each = ("--grpo.combine", "advantages", "--grpo.advantage", "running")
            assert train(tmp_path / f"run{number}", "--reward", reward, *each) == 0
            rows[reward] = read_metrics(tmp_path / f"run{number}")
            name = "glow" if reward == "glow" else "contrast"
            assert all(0 < row[f"reward/{name}/mean"] < 1 for row in rows[reward])
            assert all(row[f"time/reward/{name}"] > 0 for row in rows[reward])
            assert all(row["grad_norm"] > 0 for row in rows[reward])
            assert (tmp_path / f"run{number}" / "final" / "model_index.json").is_file()
    for found in rows.values():
        assert len(found) == 2
        for row, expected in zip(found, rows["contrast.py"], strict=True):
            renamed = {k.replace("/glow/", "/contrast/"): v for k, v in row.items()}
            assert without_times(renamed) == without_times(expected)


@pytest.mark.slow
def test_a_killed_server_loses_no_finished_iteration(tmp_path, monkeypatch, capsys) -> None:
    """It dies in the middle of the second iteration; a new one takes over where the run was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion_grpo.http_json.pause", lambda seconds: None)
    (tmp_path / "contrast.py").write_text(CONTRAST)
    (tmp_path / "dying.py").write_text(
        CONTRAST.replace("contrast(", "_score(")
        + "\n\ncalls = []\n\n\ndef contrast(images, prompts, metadata):\n"
        + "    import os\n    calls.append(1)\n"
        + "    if len(calls) == 4:  # evaluation, two chunks of iteration 0, then it dies\n"
        + "        os._exit(9)\n    return _score(images, prompts, metadata)\n"
    )
    assert train(tmp_path / "whole", "--reward", "contrast.py") == 0
    with serve("dying.py") as (url, server):
        assert train(tmp_path / "run", "--reward", url) == 1
        assert server.wait(60) == 9
    told = capsys.readouterr().err
    assert f"{url}: no connection" in told or f"{url}: the connection broke" in told
    assert f"--resume {tmp_path / 'run'}" in told
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0]
    assert saved(tmp_path / "run") == ["1"]

    with serve("contrast.py", int(url.rpartition(":")[2])) as (again, _):
        assert again == url
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    whole, resumed = (read_metrics(tmp_path / name) for name in ("whole", "run"))
    assert list(map(without_times, resumed)) == list(map(without_times, whole))
    ends = [(tmp_path / name / "evaluation.json").read_text() for name in ("whole", "run")]
    assert ends[0] == ends[1]


def saved(run: Path) -> list[str]:
    """The steps of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@contextlib.contextmanager
def serve(file: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `serve-reward` in a process of its own; yields its URL and the process."""
    words = ["serve-reward", f"{file}:contrast", "--port", str(port)]
    command = [sys.executable, "-m", "diffusion_grpo", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[4], process
        finally:
            process.terminate()


FLAKY = """import numpy as np

calls = []

def flaky(images, prompts, metadata):
    calls.append(len(images))
    if len(calls) in FAILING:
        raise RuntimeError("no connection")
    return images.std(axis=(1, 2, 3)) / 255
"""


def test_a_group_without_a_reward_is_left_out_of_the_update(tmp_path, monkeypatch) -> None:
    """Two chunks of one group each: the second call of iteration 0 fails, and its repetition."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flaky.py").write_text(FLAKY.replace("FAILING", "(3,)"))
    words = ["--reward", "flaky.py", "--reward.on-failure", "drop-group"]
    assert train(tmp_path / "run", *words, "--reward.max-dropped", "0.5") == 0
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["reward/dropped"] == rows[0]["reward/flaky/dropped"] == 0.5
    assert "reward/dropped" not in rows[1]
    assert all(np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)


def test_past_the_limit_of_dropped_groups_the_run_stops_and_is_saved(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flaky.py").write_text(FLAKY.replace("FAILING", "(5,)"))
    words = ["--reward", "flaky.py", "--reward.on-failure", "drop-group"]
    assert train(tmp_path / "run", *words) == 1
    told = capsys.readouterr().err
    assert re.search(r"1 of 2 groups were dropped, more than .*max_dropped = 0\.25", told)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0]
    assert saved(tmp_path / "run") == ["1"]


@pytest.mark.slow
def test_a_run_that_was_ended_at_its_early_stop_is_finished_and_trains_no_more(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, sign in (("rising", ""), ("falling", "-")):
        (tmp_path / f"{name}.py").write_text(
            "import numpy as np\n\ncalls = []\n\n\n"
            f"def {name}(images, prompts, metadata):\n    calls.append(1)\n"
            f"    return np.full(len(images), {sign}float(len(calls)))\n"
        )
    run = tmp_path / "run"
    words = ["--reward", "rising.py", "--eval.gold", "falling.py", "--eval.patience", "1"]
    assert train(run, *words, "--eval.every", "1") == 0
    assert [row["iteration"] for row in read_metrics(run)] == [0]
    shutil.rmtree(run / "final")
    (run / "evaluation.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert [row["iteration"] for row in read_metrics(run)] == [0]
    assert (run / "final" / "model_index.json").is_file()


def test_a_reward_of_a_group_needs_groups_in_evaluation_too(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.py").write_text(
        "from diffusion_grpo.reward import of_group\n\n\n@of_group\n"
        "def best(images, prompts, metadata):\n    levels = images.mean(axis=(1, 2, 3))\n"
        "    return levels - levels.max()\n"
    )
    assert train(tmp_path / "run", "--reward", "best.py") == 2
    assert "eval.images_per_prompt is 1, but reward 'best' compares" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    words = ["--reward", "best.py", "--eval.images-per-prompt", "2", "--run.iterations", "1"]
    assert train(tmp_path / "run", *words) == 0
    assert read_metrics(tmp_path / "run")[0]["reward/best/max"] == 0


def test_prompts_that_a_reward_cannot_judge_stop_the_run_before_any_work(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "run", "--reward", "shapes", "--prompts.train", "animals") == 2
    assert "'a cat'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
