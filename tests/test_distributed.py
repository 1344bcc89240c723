"""Two real processes over the loopback interface, with gloo: what they do, and how they end.

A run that SIGTERM stopped in one of two processes goes on in two, and is compared with one process
of two devices, all by the same command line.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_run import flags, lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.distributed import Launch, split_launch
from diffusion_grpo.divided_scoring import join_results
from diffusion_grpo.errors import UsageError
from diffusion_grpo.evaluate import divide_rows
from diffusion_grpo.metrics import read_metrics
from diffusion_grpo.pipeline import padded_chunks

ROOT = Path(__file__).parents[1]
FEW = {
    "rollout__prompts_per_iteration": 2,
    "rollout__images_per_prompt": 2,
    "rollout__microbatch": 4,
    "grpo__microbatch": 4,
    "eval__num_prompts": 3,
    "run__sample_every": 2,
}
# Something happens in the process whose environment says so, within a call of its reward.
REWARD = """
import os, signal

MOMENT = os.environ.get("MOMENT", "")
if MOMENT == "import":
    raise RuntimeError("no such library here")
calls = []

def brightness(images, prompts, metadata):
    calls.append(len(images))
    if MOMENT == "score":
        raise RuntimeError("the reward's disk is gone")
    if MOMENT == "preempted" and len(calls) == 3:  # the first is the evaluation's
        os.kill(os.getpid(), signal.SIGTERM)
    return images.reshape(len(images), -1).mean(axis=1) / 255.0
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("distributed") / "pipeline", **TWO_LEVELS)


def words(checkpoint, folder):
    (folder / "brightness.py").write_text(REWARD)
    return flags(checkpoint, folder, reward__rewards=folder / "brightness.py", **FEW)


def run(arguments, processes=2, devices=1, moments=()):
    """Train in several processes; returns each one's exit code and what it said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flag = f" --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flag}
    started = []
    for number in range(processes):
        launch = [
            f"--distributed.coordinator-address={address}",
            f"--distributed.num-processes={processes}",
            f"--distributed.process-id={number}",
        ]
        command = [sys.executable, "-m", "diffusion_grpo", "train", *map(str, arguments)]
        started.append(
            subprocess.Popen(
                command + (launch if processes > 1 else []),
                env=environment | {"MOMENT": dict(moments).get(number, "")},
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
    said = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def preempted(checkpoint, tmp_path_factory):
    """A run of two processes, one of which SIGTERM stopped in the second iteration."""
    folder = tmp_path_factory.mktemp("two")
    ends = run(words(checkpoint, folder), moments={1: "preempted"})
    for code, said in ends:
        assert code == 75, said
    assert f"diffusion-grpo train --resume {folder / 'run'}" in ends[0][1]
    assert [row["iteration"] for row in read_metrics(folder / "run")] == [0]
    return folder


@pytest.fixture(scope="module")
def of_two_devices(checkpoint, tmp_path_factory):
    """The same run, undisturbed in one process of two devices."""
    folder = tmp_path_factory.mktemp("one")
    ((code, said),) = run(words(checkpoint, folder), processes=1, devices=2)
    assert code == 0, said
    return folder / "run"


def assert_same(one, other, rel):
    rows = list(zip(lasting(one), lasting(other), strict=True))
    assert len(rows) == 2
    for first, second in rows:
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=rel, abs=2e-6), name


@pytest.mark.slow
def test_two_processes_train_as_one_of_two_devices(checkpoint, preempted, of_two_devices, tmp_path):
    both = shutil.copytree(preempted / "run", tmp_path / "run")
    for code, said in run(["--resume", both]):
        assert code == 0, said
    # Only the order in which float32 numbers are summed may differ: a level of a pixel at most.
    assert_same(of_two_devices, both, rel=1e-5)
    written = {p.relative_to(both) for p in both.rglob("*") if p.suffix in (".webp", ".png")}
    assert written == {
        p.relative_to(of_two_devices)
        for p in of_two_devices.rglob("*")
        if p.suffix in (".webp", ".png")
    }
    for path in written:
        pair = [np.asarray(Image.open(run / path).convert("RGB")) for run in (both, of_two_devices)]
        apart = np.abs(np.subtract(*map(np.float32, pair)))
        # A lossy sheet's encoder makes a block of a few levels of that one; another image, tens.
        bound = apart.mean() < 0.2 if path.suffix == ".webp" else apart.max() <= 1
        assert bound, (path, apart.mean(), apart.max())
    exported = "final/unet/diffusion_pytorch_model.safetensors"
    files = (
        both / exported,
        of_two_devices / exported,
        checkpoint / exported.removeprefix("final/"),
    )
    first, second, base = map(load_file, files)
    assert first.keys() == second.keys() == base.keys()
    apart = max(np.abs(first[name] - second[name]).max() for name in first)
    changed = max(np.abs(first[name] - base[name]).max() for name in first)
    assert apart < 0.05 * changed and changed > 1e-4


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one(preempted, of_two_devices, tmp_path):
    alone = shutil.copytree(preempted / "run", tmp_path / "run")
    assert main(["train", "--resume", str(alone), "--quiet"]) == 0
    assert_same(of_two_devices, alone, rel=1e-3)


def test_a_reward_that_fails_in_one_process_ends_both(checkpoint, tmp_path):
    for code, said in run(words(checkpoint, tmp_path), moments={1: "score"}):
        assert code == 1, said
        assert "process 1: reward 'brightness' failed" in said
        assert "the reward's disk is gone" in said and "Traceback" not in said


def test_a_process_that_fails_by_itself_ends_the_other_with_its_message(checkpoint, tmp_path):
    ends = run(words(checkpoint, tmp_path), moments={1: "import"})
    assert [code for code, _ in ends] == [2, 2]
    assert "ended, since process 1 did" in ends[0][1] and "no such library here" in ends[0][1]
    assert "no such library here" in ends[1][1] and "Traceback" not in ends[1][1]
    assert not (tmp_path / "run").exists()


def test_the_launch_is_no_part_of_the_configuration():
    assert split_launch(["demo", "--seed", "1"]) == (None, ["demo", "--seed", "1"])
    assert split_launch(["--resume", "RUN", "--distributed"]) == (Launch(), ["--resume", "RUN"])
    given = "--distributed.coordinator-address a:1 --distributed.num_processes=2".split()
    launch, rest = split_launch([*given, "demo", "--distributed.process-id", "1"])
    assert launch == Launch("a:1", 2, 1) and rest == ["demo"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--distributed.process-id", "1"],
            "coordinator-address and .*num-processes are not given",
        ),
        (["--distributed.process-ids", "1"], "did you mean '--distributed.process-id'"),
        (["--distributed.process-id", "one"], "process-id is 'one'; expected a whole number"),
        (["--distributed.process-id"], "process-id is ''; expected a whole number"),
        (["--distributed=yes"], "--distributed takes no value, but 'yes' is given"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        split_launch(given)


@pytest.mark.parametrize(
    ("address", "number", "message"),
    [
        ("localhost", 0, "is 'localhost'; expected HOST:PORT"),
        ("localhost:1", 2, "process-id is 2; expected a number from 0 to 1"),
    ],
)
def test_numbers_of_a_launch_have_to_fit(address, number, message):
    with pytest.raises(UsageError, match=message):
        Launch(address, 2, number)


def test_without_other_processes_to_find_the_options_are_named(capsys):
    command = [sys.executable, "-m", "diffusion_grpo", "train", "demo", "--distributed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--distributed.coordinator-address" in done.stderr
    assert "Traceback" not in done.stderr


def divisions(monkeypatch, processes, *arguments):
    from diffusion_grpo import processes as module

    monkeypatch.setattr(module, "count", lambda: processes)
    monkeypatch.setattr("diffusion_grpo.pipeline.shards", lambda: processes)
    found = []
    for rank in range(processes):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        found.append(divide_rows(*arguments))
    return found


def test_an_evaluation_is_divided_by_whole_groups(monkeypatch):
    (alone,) = divisions(monkeypatch, 1, 14, 2, 4)
    np.testing.assert_array_equal(alone.chunks, padded_chunks(14, 4))
    assert alone.own == slice(0, 14) and alone.places.tolist() == list(range(14))
    both = divisions(monkeypatch, 2, 14, 2, 4)
    assert [division.own for division in both] == [slice(0, 6), slice(6, 14)]
    drawn = np.concatenate(
        [np.asarray(both[0].chunks)[:, rows].ravel() for rows in (slice(2), slice(2, 4))]
    )
    assert drawn[both[0].places].tolist() == list(range(14))


def test_more_processes_than_prompts_leave_some_without(monkeypatch):
    every = divisions(monkeypatch, 4, 2, 1, 4)
    assert [d.own.stop - d.own.start for d in every] == [0, 1, 0, 1]
    drawn = np.concatenate(np.asarray(every[0].chunks).T)
    assert drawn[every[0].places].tolist() == [0, 1]


def test_scores_of_all_processes_are_joined():
    def part(values, seconds, kept, notes):
        return {
            "scores": {"a": values},
            "total": values,
            "seconds": {"a": seconds},
            "weights": {"a": 1.0},
            "kept": kept,
            "cached": {"a": kept.count(True) / len(kept)},
            "notes": notes,
        }

    nan = float("nan")
    result = join_results(
        [part([1.5, 2.0], 1.0, [True, True], []), part([nan, nan], 2.0, [False, False], ["x"])]
    )
    np.testing.assert_array_equal(result.total, np.float32([1.5, 2.0, nan, nan]))
    assert result.kept.tolist() == [True, True, False, False] and result.seconds == {"a": 2.0}
    assert result.cached == {"a": 0.5} and result.notes == ("process 1: x",)
