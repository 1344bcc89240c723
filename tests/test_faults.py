"""Faults around a run, injected one by one: what its user is told, and what is left."""

import errno
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import config, flags, lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline

import diffusion_grpo.train as train_module
from diffusion_grpo.checkpoint import Checkpoints
from diffusion_grpo.cli import main
from diffusion_grpo.errors import RunError, UsageError
from diffusion_grpo.faults import phase
from diffusion_grpo.learning import GRPOLearner
from diffusion_grpo.optim import TrainState, make_update
from diffusion_grpo.preparation import check_lists, describe_lists, make_directory
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.reward_record import describe_rewards, edited_rewards, read_record
from diffusion_grpo.run_lock import RunLock
from diffusion_grpo.train import train

# Where a folder is gone, Orbax leaves coroutines that it never awaited, found now or later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("faults") / "pipeline", **TWO_LEVELS)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """An undisturbed run of three iterations, every one of them saved."""
    folder = tmp_path_factory.mktemp("finished")
    train(config(checkpoint, folder, run__iterations=3, run__keep_checkpoints=3), quiet=True)
    return folder


def before_the_update(monkeypatch, number, action):
    """Do something within iteration `number`, after its images are scored."""
    original, calls = train_module.image_advantages, []

    def wrapped(*arguments, **options):
        calls.append(1)
        result = original(*arguments, **options)
        if len(calls) == number + 1:
            changed = action(*result)
            return result if changed is None else changed
        return result

    monkeypatch.setattr(train_module, "image_advantages", wrapped)


@pytest.mark.parametrize("where", ["load_model", "open_directory"])
def test_a_run_that_is_preempted_as_it_starts_is_to_be_started_again(
    where, checkpoint, tmp_path, monkeypatch, capsys
):
    words, run = flags(checkpoint, tmp_path), tmp_path / "run"
    original = getattr(train_module, where)

    def preempted(*arguments, **options):
        found = original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    def unheeded(*_):
        raise AssertionError("SIGTERM would have killed it")

    monkeypatch.setattr(train_module, where, preempted)
    before = signal.signal(signal.SIGTERM, unheeded)
    try:
        assert main(["train", *words]) == 75
        assert signal.getsignal(signal.SIGTERM) is unheeded
    finally:
        signal.signal(signal.SIGTERM, before)
    again = words
    if where == "open_directory":
        again = ["--resume", str(run)]
        begun = json.loads((run / "prompts.json").read_text())
        assert [begun[side]["prompts"] for side in ("train", "heldout")] == [3, 3]
    told = f"stopped; go on with: {shlex.join(['diffusion-grpo', 'train', *again])}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("train", "a red circle\na blue square\n", "there were 3 prompts to train on, now 2"),
        ("train", "a red circle\na blue star\ntwo green stars\n", "now as many, but not the same"),
        ("heldout", "a blue star\n", "there were 2 prompts to evaluate on, now 1"),
    ],
)
def test_a_run_whose_prompts_were_edited_is_not_gone_on_with(field, text, told, tmp_path, capsys):
    heldout, run = tmp_path / "heldout.txt", tmp_path / "run"
    heldout.write_text("a blue star\na red star\n")
    settings = config(tmp_path / "pipeline", tmp_path, prompts__heldout=heldout)
    files = {"train": tmp_path / "prompts.txt", "heldout": heldout}
    lists = describe_lists(*map(load_prompts, map(str, files.values())))
    with make_directory(settings, run, lists=lists):
        pass
    for file in files.values():  # the prompts are the same
        file.write_text("# a comment\n\n" + file.read_text())
    check_lists(settings, describe_lists(*map(load_prompts, map(str, files.values()))))
    files[field].write_text(text)
    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"prompts.{field} is {str(files[field])!r}, which has been edited" in message
    assert told in message and "Put the list back, or begin another run" in message
    (run / "prompts.json").write_text('{"train"')
    assert main(["train", "--resume", str(run)]) == 2
    assert "does not say which prompts the run began with" in capsys.readouterr().err


def test_of_a_reward_that_was_edited_a_run_that_goes_on_says_so(tmp_path):
    bright, gold, run = tmp_path / "bright.py", tmp_path / "gold.py", tmp_path / "run"
    for file in (bright, gold):
        file.write_text("def judge(images, prompts, metadata): return images.mean((1, 2, 3))\n")
    settings = config(
        tmp_path / "pipeline",
        tmp_path,
        reward__rewards=f"{bright}:judge=2 contrast",
        eval__gold=gold,
    )
    begun = describe_rewards(settings, {"owner/name": "a" * 40})
    assert list(begun.files) == ["judge", "gold"]  # a built-in one is the package's
    with make_directory(settings, run, rewards=begun):
        pass
    assert read_record(run) == begun and edited_rewards(begun, begun) == []
    bright.write_text(bright.read_text().replace("mean", "std"))
    edited = describe_rewards(settings, begun.commits)
    (note,) = edited_rewards(begun, edited)
    assert note.startswith("the file of reward 'judge' was edited since the run began")
    with make_directory(settings, run, rewards=edited, resume=True):
        pass
    assert read_record(run) == edited  # it is told once
    for damaged in ('{"files"', "[]", '{"files": {}}', '{"files": {}, "commits": 3}'):
        (run / "rewards.json").write_text(damaged)
        with pytest.raises(UsageError, match="does not say what the run's rewards are made of"):
            read_record(run)
    (run / "rewards.json").unlink()
    assert edited_rewards(read_record(run), edited) == []


def test_of_a_run_that_was_moved_it_is_told_where_to_name_what_is_elsewhere_now(tmp_path, capsys):
    run, place = tmp_path / "run", tmp_path / "run" / "config.yaml"
    with make_directory(config(tmp_path / "pipeline", tmp_path), run):
        pass
    told = f"(named by {place}, where what has moved is to be named anew)"
    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"checkpoint '{tmp_path / 'pipeline'}': no such directory" in message and told in message
    (tmp_path / "prompts.txt").unlink()
    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"prompts '{tmp_path / 'prompts.txt'}': no such list" in message and told in message
    for words in (["compare", str(run)], ["evaluate", str(run), "--reward", "jpeg_size"]):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert f"named by {place}" in message and "by --prompts NAME|FILE" in message


def test_a_directory_in_use_is_refused_before_the_checkpoint_is_asked_for(
    tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(train_module, "local_directory", lambda *words, **_: asked.append(words))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert main(["train", *flags(tmp_path / "pipeline", tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err and not asked


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(broken):
    def gradient_of(params, scale):
        nan = jnp.float32(jnp.nan)
        gradient = {"w": scale * jnp.ones(3)}
        loss = scale.sum()
        if broken == "loss":
            return gradient, {"loss": jnp.where(scale > 1, nan, loss)}
        return {"w": jnp.where(scale > 1, nan, gradient["w"])}, {"loss": loss}

    optimizer = optax.adam(0.1)
    update = make_update(gradient_of, optimizer, ema_decay=0.5)
    params = {"w": jnp.zeros(3)}
    state = TrainState(params, optimizer.init(params), {"w": jnp.ones(3)}, jnp.int32(0))
    counts, skips = [], []
    for scale in (1.0, 2.0, 2.0, 1.0):
        before = jax.device_get(state)
        state, metrics = update(state, jnp.float32(scale))
        if scale > 1:
            for a, b in zip(jax.tree.leaves(before[:3]), jax.tree.leaves(state[:3]), strict=True):
                np.testing.assert_array_equal(a, b)
        counts.append(int(state.nonfinite))
        skips.append(float(metrics["skipped"]))
    assert counts == [0, 1, 2, 0] and skips == [0, 1, 1, 0]


def test_too_many_updates_that_are_not_finite_stop_the_run(
    checkpoint, tmp_path, monkeypatch, capsys
):
    words = flags(checkpoint, tmp_path, run__iterations=4, run__max_nonfinite=0)
    before_the_update(monkeypatch, 1, lambda advantages, history: (advantages * jnp.nan, history))
    assert main(["train", *words]) == 1
    message = capsys.readouterr().err
    assert "1 updates in a row were skipped" in message and "run.max_nonfinite = 0" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '2'}" in message
    assert f"diffusion-grpo train --resume {tmp_path / 'run'}" in message
    assert [row["skipped"] for row in lasting(tmp_path / "run")] == [0, 1]


def test_a_truncated_checkpoint_costs_an_iteration_and_not_the_run(finished, tmp_path, capsys):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    for path in (run / "checkpoints" / "3").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:1000])
    assert main(["train", "--resume", str(run)]) == 0
    shown = "".join(capsys.readouterr())
    assert f"checkpoint {run / 'checkpoints' / '3'} cannot be read" in shown
    assert "going on from 2" in shown
    assert lasting(run) == lasting(finished / "run")


def watched(monkeypatch, action):
    """Do something as a checkpoint is about to be read, with references to the state so far."""
    init, read = GRPOLearner.init, Checkpoints._read
    states: list[weakref.ref] = []

    def initial(self, *arguments):
        state = init(self, *arguments)
        large = [leaf for leaf in jax.tree.leaves(state.train) if leaf.ndim]
        states.extend(map(weakref.ref, large))
        return state

    def reading(self, step, template):
        action(states)
        return read(self, step, template)

    monkeypatch.setattr(GRPOLearner, "init", initial)
    monkeypatch.setattr(Checkpoints, "_read", reading)


def test_a_checkpoint_is_restored_in_place_of_the_state(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "3")
    there = []

    def count(states):
        gc.collect()
        assert states
        there.append(sum(state() is not None for state in states))

    watched(monkeypatch, count)
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert there == [0]
    assert lasting(run) == lasting(finished / "run")


def test_memory_that_runs_out_as_a_checkpoint_is_read_is_told(
    finished, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    watched(monkeypatch, lambda states: jnp.zeros(2**44).block_until_ready())
    assert main(["train", "--resume", str(run), "--quiet"]) == 1
    message = capsys.readouterr().err
    assert "out of device memory in restoring the checkpoint" in message
    assert "Traceback" not in message
    assert (run / "checkpoints" / "3").is_dir()


def test_a_full_disk_is_told_with_the_command_to_go_on(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "rollouts"))

    before_the_update(monkeypatch, 1, full)
    assert main(["train", *flags(checkpoint, tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'rollouts'} could not be written: No space left" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '1'}" in message
    assert "make room on the disk, then go on with: diffusion-grpo train --resume" in message
    assert "Traceback" not in message


def test_a_removed_run_directory_is_told(checkpoint, tmp_path, monkeypatch, capsys):
    def remove(*_):
        while (tmp_path / "run").exists():  # the last checkpoint may still be being written
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    before_the_update(monkeypatch, 1, remove)
    assert main(["train", *flags(checkpoint, tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"run directory {tmp_path / 'run'} was removed while the run" in message
    assert "Traceback" not in message
    gc.collect()  # that garbage is found here


def test_a_removed_metrics_file_is_told(checkpoint, tmp_path, monkeypatch, capsys):
    metrics = tmp_path / "run" / "metrics.jsonl"
    before_the_update(monkeypatch, 1, lambda *_: metrics.unlink())
    assert main(["train", *flags(checkpoint, tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"{metrics} could not be written: it was removed" in message
    assert "the last good checkpoint is" in message and "--resume" in message


def test_a_metrics_file_that_cannot_be_written_is_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"{run / 'metrics.jsonl'} cannot be written" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("loading the model", "model.dtype"),
        ("restoring the checkpoint", "what other programs hold of that memory, or raise mesh.fsdp"),
        ("sampling", "rollout.microbatch"),
        ("the update", "grpo.microbatch"),
        ("evaluation", "rollout.microbatch"),
    ],
)
def test_memory_that_runs_out_names_what_to_lower(name, option):
    with pytest.raises(RunError, match=rf"out of device memory in {name}: .* Lower {option}"):
        with phase(name):
            jnp.zeros(2**44).block_until_ready()  # 64 TiB


def test_memory_that_runs_out_in_a_run_is_told_with_the_checkpoint(
    checkpoint, tmp_path, monkeypatch, capsys
):
    def learn(self, *arguments):
        if arguments[3] == 1:
            jnp.zeros(2**44).block_until_ready()
        return original(self, *arguments)

    original = GRPOLearner.learn
    monkeypatch.setattr(GRPOLearner, "learn", learn)
    assert main(["train", *flags(checkpoint, tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "out of device memory in the update" in message and "Lower grpo.microbatch" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '1'}" in message


def test_a_second_process_on_a_run_directory_is_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from diffusion_grpo.run_lock import RunLock\n"
            "RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            str(run),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert main(["train", "--resume", str(run)]) == 2
        message = capsys.readouterr().err
        assert f"run directory {run} is in use by process {holder.pid} on " in message
    finally:
        holder.kill()
        holder.wait()
        for stream in (holder.stdin, holder.stdout):
            assert stream is not None
            stream.close()
    with RunLock(run):  # the killed process has left a file, and no lock
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(code, tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("diffusion_grpo.run_lock.fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .*no second process"):
        lock = RunLock(tmp_path)
    with lock:
        assert (tmp_path / ".lock").is_file()
