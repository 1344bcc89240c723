"""The same run on 1, 2 and 8 devices, and what it sends between them.

The devices are virtual ones of the CPU; mesh, partitioner and collectives are the real ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_run import config, lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline
from virtual_run import said_on

from diffusion_grpo.errors import UsageError
from diffusion_grpo.mesh import make_mesh, make_mesh_at_hand, parameter_spec, shard_order, take_rows

# Relative, and absolute beside it for metrics near 0: sums of float32 in another order.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-6}
# The size of a JPEG file jumps by a byte where a pixel is rounded otherwise, which is more than the
# tolerance; the mean of the pixels does not.
RUN = {
    "reward__rewards": "brightness",
    "rollout__prompts_per_iteration": 16,
    "rollout__images_per_prompt": 2,
    "rollout__microbatch": 16,  # 2 images of one prompt on each of 8 devices, in 2 microbatches
    "grpo__microbatch": 16,
    "grpo__beta": 0.1,
    "grpo__updates_per_rollout": 2,
}
FULL = ("model__trainable=full",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("mesh") / "pipeline", **TWO_LEVELS)


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """Train on a number of virtual devices; returns the folder."""
    done: dict[tuple[int, tuple[str, ...]], Path] = {}

    def run(devices: int, *changed: str) -> Path:
        if (devices, changed) not in done:
            folder = tmp_path_factory.mktemp("run")
            words = [f"{name}={value}" for name, value in RUN.items()]
            flags = os.environ.get("XLA_FLAGS", "")
            flags += f" --xla_force_host_platform_device_count={devices}"
            subprocess.run(
                [sys.executable, "tests/mesh_run.py", str(checkpoint), str(folder)]
                + [*words, *changed],
                check=True,
                capture_output=True,
                env=os.environ | {"XLA_FLAGS": flags},
                cwd=Path(__file__).parents[1],
            )
            done[devices, changed] = folder
        return done[devices, changed]

    return run


def assert_same_metrics(one: Path, other: Path) -> None:
    rows = list(zip(lasting(one / "run"), lasting(other / "run"), strict=True))
    assert len(rows) == 2
    for first, second in rows:
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(
                value, rel=TOLERANCE["rtol"], abs=TOLERANCE["atol"]
            ), name


@pytest.mark.slow
def test_an_adapter_trains_alike_on_1_and_8_devices(trained):
    assert_same_metrics(trained(1), trained(8))


@pytest.mark.slow
def test_diffusion_nft_trains_alike_on_1_and_8_devices(trained):
    nft = ("grpo__algorithm=nft", "grpo__kl=mse", "nft__timesteps=2")
    assert_same_metrics(trained(1, *nft), trained(8, *nft))


def test_a_run_of_8_devices_goes_on_alike_on_one(trained, checkpoint):
    # 2 x 4 devices divide the frozen network; the checkpoint of the first iteration goes on on one.
    from shutil import rmtree

    folder = trained(8)
    run = folder / "run"
    undisturbed = lasting(run)
    rmtree(run / "checkpoints" / "2")
    from diffusion_grpo.cli import main

    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    for first, second in zip(undisturbed, lasting(run), strict=True):
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-3, abs=2e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (2, 2), (8, 4)])
def test_a_whole_network_trains_alike_replicated_and_divided(trained, devices, fsdp):
    assert_same_metrics(trained(1, *FULL), trained(devices, *FULL, f"mesh__fsdp={fsdp}"))


@pytest.mark.slow
def test_an_update_of_a_divided_network_gathers_parameters_and_no_image(trained):
    folder = trained(8, *FULL, "mesh__fsdp=4")
    found = json.loads((folder / "communication.json").read_text())
    sums = {kind: 0 for kind, _, _ in found["accumulate"]}
    for kind, _, size in found["accumulate"]:
        sums[kind] += size
    assert sums.keys() == {"all-reduce", "all-gather"}
    assert sums["all-gather"] <= found["gradient_bytes"]
    assert sums["all-reduce"] <= found["gradient_bytes"] + 64
    assert found["slice"] == found["join"] == []


def test_an_adapters_update_sends_its_gradient_and_no_image(trained):
    found = json.loads((trained(8) / "communication.json").read_text())
    gradient = found["gradient_bytes"]
    assert {kind for kind, _, _ in found["total"]} == {"all-reduce"}
    assert gradient <= sum(size for _, _, size in found["total"]) <= 1.05 * gradient
    # What else leaves a device are sums over all images, of a few scalars.
    for name in ("accumulate", "terms"):
        assert all(kind == "all-reduce" for kind, _, _ in found[name])
        assert sum(size for _, _, size in found[name]) <= 64
    assert found["slice"] == found["join"] == []  # no image and no latent is moved


@pytest.mark.parametrize(
    "changed",
    [
        ("model__trainable=full", "mesh__fsdp=4"),
        pytest.param(("model__trainable=full",), marks=pytest.mark.slow),
        pytest.param(("model__train_text_encoder=True", "mesh__fsdp=4"), marks=pytest.mark.slow),
    ],
)
def test_a_device_holds_each_network_once(checkpoint, tmp_path, changed):
    words = [f"{name}={value}" for name, value in RUN.items()]
    found = said_on(4, "mesh_memory.py", checkpoint, tmp_path, *words, *changed)
    assert found["used"] <= found["live"] <= 1.02 * found["used"]


def test_guidance_leaves_images_on_their_devices():
    found = said_on(4, "mesh_guidance.py")
    assert found["collectives"] == [] and found["error"] < 1e-5


def test_parameters_are_divided_along_their_largest_axis():
    assert parameter_spec((3, 3, 320, 640), 4) == P(None, None, None, "fsdp")
    assert parameter_spec((3, 3, 640, 320), 4) == P(None, None, "fsdp")
    assert parameter_spec((6, 5), 4) == P() and parameter_spec((), 4) == P()
    assert parameter_spec((8, 8), 4) == P(None, "fsdp") and parameter_spec((8, 10), 4) == P("fsdp")
    assert parameter_spec((8, 8), 1) == P()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mesh__data": 2}, "mesh.data 2 x mesh.fsdp 1 asks for 2 devices, but there is 1 device"),
        ({"mesh__fsdp": 4}, "asks for 4 devices, but there is 1 device"),
        ({"mesh__fsdp": 0}, "mesh.fsdp is 0; expected 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(tmp_path, changed, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(config(tmp_path, tmp_path, **changed))


@pytest.mark.parametrize(
    ("devices", "changed", "shape"),
    [
        (1, {"mesh__fsdp": 4}, (1, 1)),
        (8, {"mesh__fsdp": 4}, (2, 4)),  # 2 prompts an iteration divide over no 8 devices
        (8, {"mesh__data": 1, "mesh__fsdp": 4}, (1, 4)),
        (8, {"mesh__data": 4, "mesh__fsdp": 4}, (1, 1)),
        (6, {"mesh__fsdp": 4}, (1, 4)),
        (8, {}, (8, 1)),
    ],
)
def test_what_draws_no_image_needs_neither_the_devices_nor_batches_that_divide(
    tmp_path, monkeypatch, devices, changed, shape
):
    (device,) = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: [device] * devices)
    mesh = make_mesh_at_hand(config(tmp_path, tmp_path, **changed))
    assert mesh.devices.shape == shape


def test_images_that_do_not_divide_over_the_devices_are_refused(tmp_path):
    from diffusion_grpo.mesh import check_divides

    options = config(tmp_path, tmp_path, rollout__prompts_per_iteration=2)
    with pytest.raises(UsageError, match=r"prompts_per_iteration is 2.* over 8 .*--mesh.data 2"):
        check_divides(options, 8)
    check_divides(options, 2)


def test_without_a_mesh_rows_are_rows():
    x = jax.numpy.arange(12).reshape(6, 2)
    assert (take_rows(x, slice(2, 4)) == x[2:4]).all()
    assert shard_order(6, 2).tolist() == list(range(6))
