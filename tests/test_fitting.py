"""What a device's memory decides: images at a time, and whether activations are recomputed."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
import yaml
from test_plan import _tiny
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.config import load_config
from diffusion_grpo.devices import DEVICES, Device, device_here, nearest
from diffusion_grpo.errors import UsageError
from diffusion_grpo.fitting import SHARE, WITHIN, fitted
from diffusion_grpo.plan import make_plan

# 2 prompts x 4 images, all of them learned from, of 4 steps.
WORDS = ["--rollout.prompts-per-iteration", "2", "--rollout.images-per-prompt", "4"]
WORDS += ["--grpo.best-and-worst", "None", "--grpo.step-weights", "uniform", "--grpo.beta", "0"]
WORDS += ["--rollout.num-steps", "4", "--rollout.window-size", "2", "--model.trainable", "lora"]
WORDS += ["--rollout.microbatch", "8"]
OPEN = ["--rollout.microbatch", "None", "--grpo.microbatch", "None"]
OPEN += ["--model.gradient-checkpointing", "None"]
SIZES = (1, 2, 4, 8)


def _device(memory, latency=1e-6):
    return Device("gpu", 1e12, 1e12, 1e11, memory, 1e9, latency=latency)


def _chosen(config):
    return (
        config.rollout.microbatch,
        config.grpo.microbatch,
        config.model.gradient_checkpointing,
    )


@functools.cache
def _planned(drawn, learned, recomputed):
    config = load_config(
        "demo",
        [
            *WORDS,
            *("--rollout.microbatch", str(drawn), "--grpo.microbatch", str(learned)),
            *("--model.gradient-checkpointing", str(recomputed)),
        ],
    )
    return make_plan(config, _tiny(), _device(1e12), 1)


def _held(plan, program):
    """Bytes of a plan while a program runs."""
    kept = sum(size for name, size in plan.memory.items() if not name.startswith("while "))
    return kept + plan.memory[f"while {program}"]


def test_the_update_is_the_fastest_that_fits_or_near_it_with_less_memory():
    open_config = load_config("demo", [*WORDS, *OPEN])
    plans = {
        (size, recompute): _planned(8, size, recompute)
        for size in SIZES
        for recompute in (False, True)
    }
    seconds = {key: plan.seconds["update"] for key, plan in plans.items()}
    held = {key: _held(plan, "updating") for key, plan in plans.items()}
    memories = [1.01 * held[key] / SHARE for key in ((8, False), (1, False))]
    # Room for the recomputed program of a single image alone.
    memories.append((held[1, True] + held[1, False]) / 2 / SHARE)
    found = []
    for memory in memories:
        config, _ = fitted(open_config, _tiny(), _device(memory), 1)
        chosen = config.grpo.microbatch, config.model.gradient_checkpointing
        fit = [key for key in plans if held[key] <= SHARE * memory]
        near = [key for key in fit if seconds[key] <= WITHIN * min(seconds[k] for k in fit)]
        assert chosen == min(near, key=held.__getitem__), memory
        found.append(chosen)
    assert found[0][0] > 1 and not found[0][1] and found[-1][1], found


def test_what_is_drawn_at_a_time_fits_beside_the_gradients_of_the_update():
    words = [*WORDS, "--grpo.microbatch", "4", "--model.gradient-checkpointing", "True"]
    open_config = load_config("demo", [*words, "--rollout.microbatch", "None"])
    plans = {size: _planned(size, 4, True) for size in SIZES}
    seconds = {
        size: plan.seconds["sample"] + plan.seconds["decode"] for size, plan in plans.items()
    }
    held = {
        size: max(_held(plan, p) for p in ("sampling", "decoding")) for size, plan in plans.items()
    }
    for roomy in (2, 8):
        memory = 1.01 * held[roomy] / SHARE
        config, _ = fitted(open_config, _tiny(), _device(memory), 1)
        fit = [size for size in SIZES if held[size] <= SHARE * memory]
        near = [size for size in fit if seconds[size] <= WITHIN * min(seconds[s] for s in fit)]
        assert _chosen(config) == (min(near), 4, True)


def test_where_nothing_fits_the_least_memory_is_taken():
    config, notes = fitted(load_config("demo", [*WORDS, *OPEN]), _tiny(), _device(1e3), 1)
    assert _chosen(config) == (1, 1, True)
    assert notes == [
        "for 0 GiB of memory: 1 images are drawn at a time and 1 differentiated, with activations "
        "recomputed for the backward pass"
    ]


def test_what_is_given_is_kept_and_a_microbatch_is_of_all_devices():
    words = [*WORDS, *OPEN, "--rollout.prompts-per-iteration", "4", "--grpo.microbatch", "8"]
    config, _ = fitted(load_config("demo", words), _tiny(), _device(1e12), 4)
    assert config.grpo.microbatch == 8 and config.model.gradient_checkpointing is False
    assert config.rollout.microbatch % 4 == 0
    given = load_config("demo", [*WORDS, "--grpo.microbatch", "8"])
    assert fitted(given, _tiny(), _device(1.0), 1) == (given, [])


def test_a_microbatch_has_whole_groups_or_equal_parts_of_one():
    # Of 3 prompts x 4 images the divisors 3 and 6 would cut groups unevenly.
    words = [*WORDS, *OPEN, "--rollout.prompts-per-iteration", "3"]
    for memory in (4e6, 1e12):
        config, _ = fitted(load_config("demo", words), _tiny(), _device(memory, 1e-3), 1)
        for size in (config.rollout.microbatch, config.grpo.microbatch):
            assert size in (1, 2, 4, 12)


def test_a_run_chooses_tells_and_writes_down_what_it_chose(tmp_path, capsys):
    checkpoint = write_pipeline(tmp_path / "pipeline", **TWO_LEVELS)
    words = tiny_run.flags(
        checkpoint,
        tmp_path,
        rollout__microbatch=None,
        grpo__microbatch=None,
        model__gradient_checkpointing=None,
    )
    assert main(["train", *words]) == 0
    said = capsys.readouterr().err
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    drawn, learned = written["rollout"]["microbatch"], written["grpo"]["microbatch"]
    assert f"{drawn} images are drawn at a time and {learned} differentiated" in said
    assert 8 % drawn == 0 and 8 % learned == 0
    assert written["model"]["gradient_checkpointing"] is False  # a small network on this machine


def test_an_open_choice_has_to_be_made_before_anything_is_compiled():
    config = load_config("demo", [*WORDS, "--grpo.microbatch", "None"])
    with pytest.raises(UsageError, match=r"grpo\.microbatch is None; expected a value"):
        make_plan(config, _tiny(), _device(1e12), 1)


def test_plan_says_what_is_chosen(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", "demo", *WORDS, *OPEN, "--device", "l4", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "for 22 GiB of memory: " in said and "activations kept" in said
    found = yaml.safe_load(path.read_text())
    assert f"{found['microbatch']} images are drawn" in said
    assert found["gradient_checkpointing"] is False


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [
        ("NVIDIA H200", "gpu", "h200"),
        ("NVIDIA H100 80GB HBM3", "gpu", "h100"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "gpu", "a100-40gb"),
        ("NVIDIA L40S", "gpu", "l40s"),
        ("NVIDIA L4", "gpu", "l4"),
        ("NVIDIA GeForce RTX 4090", "gpu", "rtx4090"),
        ("TPU v4", "tpu", "tpu-v4"),
        ("TPU v5 lite", "tpu", "tpu-v5e"),
        ("TPU v5", "tpu", "tpu-v5p"),
        ("TPU v6 lite", "tpu", "tpu-v6e"),
        ("something new", "gpu", "a100-40gb"),
        ("TPU v9", "tpu", "tpu-v4"),
    ],
)
def test_the_device_here_is_found_in_the_table(kind, platform, name):
    assert nearest(kind, platform) == name


class _Accelerator:
    device_kind, platform = "NVIDIA L4", "gpu"

    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_the_device_here_has_the_memory_that_jax_may_use(monkeypatch):
    for stats, memory in (({"bytes_limit": 17e9}, 17e9), (None, DEVICES["l4"].memory)):
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: [_Accelerator(stats)])
        assert device_here() == dataclasses.replace(DEVICES["l4"], memory=memory)


def test_a_cpu_is_measured():
    device = device_here()
    assert device.backend == "cpu" and device.memory > 1e9 and np.isfinite(device.flops)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_divided_run_chooses_for_all_its_devices(fsdp, tmp_path):
    checkpoint = write_pipeline(tmp_path / "pipeline", **TWO_LEVELS)
    words = tiny_run.flags(
        checkpoint,
        tmp_path,
        rollout__prompts_per_iteration=4,
        rollout__microbatch=None,
        grpo__microbatch=None,
        model__gradient_checkpointing=None,
        mesh__fsdp=fsdp,
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-m", "diffusion_grpo", "train", *words],
        check=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    sizes = written["rollout"]["microbatch"], written["grpo"]["microbatch"]
    assert all(size % 4 == 0 and 16 % size == 0 for size in sizes)


def test_devices_that_do_not_divide_the_prompts_are_refused_before_anything_is_chosen(capsys):
    assert main(["plan", "demo", *WORDS, *OPEN, "--device", "l4", "--devices", "4"]) == 2
    said = capsys.readouterr().err
    assert "rollout.prompts_per_iteration is 2, which 4 devices do not divide" in said


def test_on_a_cpu_every_core_has_a_microbatch(monkeypatch):
    monkeypatch.setattr("diffusion_grpo.plan.cores", lambda: 2)
    config = load_config("demo", [*WORDS, *OPEN])
    # All 8 images are a little less work at once, but for one core; 4 and 4 are for two of them.
    for backend, size in (("cpu", 4), ("gpu", 8)):
        device = Device(backend, 1e9, 1e9, 1e9, 1e12, 1e9, latency=1e-4)
        found, _ = fitted(config, _tiny(), device, 1)
        assert found.grpo.microbatch == size and found.rollout.microbatch <= 4
