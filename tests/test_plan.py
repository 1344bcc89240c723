"""`diffusion-grpo plan`: costs of traced programs, and a run's memory and time."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.config import load_config
from diffusion_grpo.costs import program_cost
from diffusion_grpo.devices import DEVICES, Device
from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.kernels import VARIABLE, attend, planned_for
from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.models.vae import VAEConfig
from diffusion_grpo.plan import USABLE, make_plan
from diffusion_grpo.plan_memory import Memory, peak_of
from diffusion_grpo.published import ARCHITECTURES, find_architecture
from diffusion_grpo.resources import resource_path

KIB = 1024
SMALL = ["--rollout.prompts-per-iteration", "2", "--rollout.images-per-prompt", "2"]
SMALL += ["--grpo.best-and-worst", "None", "--grpo.step-weights", "uniform"]
SMALL += ["--rollout.num-steps", "3", "--rollout.window-size", "1", "--rollout.microbatch", "4"]
SMALL += ["--grpo.microbatch", "4"]


def test_elementwise_work_takes_no_memory_and_products_are_freed_after_their_last_reader():
    a = jax.ShapeDtypeStruct((16, 16), jnp.float32)  # 1 KiB

    def chain(a):
        x = jnp.tanh(a @ a) + 1  # written, for the next product reads it
        y = x @ x
        return (y @ y).sum()

    cost = program_cost(chain, a)
    assert cost.arguments == KIB and cost.flops == 3 * 2 * 16**3
    # the product, and tanh(.) + 1 of it; then x and y; then y and y @ y
    assert cost.peak == 2 * KIB


@pytest.mark.parametrize(("backend", "stored"), [("cpu", True), ("gpu", False)])
def test_elementwise_work_for_two_readers_is_stored_on_a_cpu_and_done_twice_elsewhere(
    backend, stored
):
    a = jax.ShapeDtypeStruct((16, 16), jnp.float32)

    def two_readers(a):
        product = a @ a
        x = jnp.tanh(product)
        first, second = x + 1, x * 2  # each in the kernel that reads x, or computes it
        return (first @ a) @ second

    with planned_for(backend):
        cost = program_cost(two_readers, a)
    products = 2 + 3 + 3  # what they read and write; the first one's two operands are one array
    operands = 2 + 2  # x + 1 and x * 2, each from x or from what it is computed from
    assert cost.bytes == (products + operands + 2 * stored) * KIB


def test_a_sum_of_two_arrays_that_three_kernels_read_is_stored_anywhere():
    a = jax.ShapeDtypeStruct((16, 16), jnp.float32)

    def readers(a, b, count):
        x = (a @ a) + (b @ b)
        parts = [jnp.tanh(x * (i + 1)) @ a for i in range(count)]
        return sum(part.sum() for part in parts)

    def stored(count):
        with planned_for("gpu"):
            cost = program_cost(lambda a, b: readers(a, b, count), a, a)
        # Each reader reads the sum, or both products.
        return cost.bytes / KIB - 2 * 2 - count * (1 + 3 + 1)

    # As 2 readers read 4 arrays, and 5 would be moved if it were stored; as 4 do, 8 and 7.
    assert stored(2) == pytest.approx(2 * 2, abs=0.05)
    assert stored(4) == pytest.approx(2 + 1 + 4, abs=0.05)


@pytest.mark.parametrize(("backend", "copies"), [("cpu", 0), ("gpu", 1)])
def test_a_loops_convolution_kernels_are_brought_into_order_once_before_it(backend, copies):
    x = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)

    def loop(x, kernel):
        def step(x, _):
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ), None

        return jax.lax.scan(step, x, None, length=5)[0]

    with planned_for(backend):
        peak = program_cost(loop, x, kernel).peak
    # the loop's state, and what a step makes of it
    assert peak - copies * 4 * 3 * 3 * 8 * 8 == 2 * 4 * 4 * 4 * 8


def test_a_loop_costs_its_body_as_often_as_it_runs():
    a = jax.ShapeDtypeStruct((16, 16), jnp.float32)

    def loop(a):
        return jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=7)[0]

    cost = program_cost(loop, a)
    assert cost.flops == 7 * 2 * 16**3
    # a product reads two matrices and writes one; at 1 byte/s that is the time of each
    np.testing.assert_allclose(cost.seconds(1e30, 1.0), 7 * 3 * KIB)
    np.testing.assert_allclose(cost.seconds(1.0, 1e30), cost.flops)


def test_what_fits_into_a_cpus_cache_is_moved_faster():
    small, large = (jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (16, 32))

    def products(small, large):
        return small @ small, large @ large

    cost = program_cost(products, small, large)
    # Operands and result: 2 of 1 KiB (an operand is read once), and 2 of 4 KiB.
    moved = [2 * KIB, 8 * KIB]
    np.testing.assert_allclose(cost.seconds(1e30, 1.0), sum(moved))
    cached = cost.seconds(1e30, 1.0, cache=4 * KIB, cache_speedup=8.0)
    np.testing.assert_allclose(cached, moved[0] / 8 + moved[1])


def test_a_devices_shares_are_of_its_rates():
    cost = program_cost(lambda a: a @ a, jax.ShapeDtypeStruct((16, 16), jnp.float32))
    shares = {"efficiency": 0.5, "bandwidth_efficiency": 0.25, "cache": 4 * KIB}
    device = Device("cpu", 1.0, 1.0, 1.0, 1.0, 1.0, **shares, cache_speedup=2.0, latency=0.0)
    by_products, by_memory = 2 * 16**3 / 0.5, 2 * KIB / 0.25 / 2
    assert device.seconds(cost, 1.0) == max(by_products, by_memory) == by_products
    assert device.seconds(cost, 1e9) == by_memory
    slow = dataclasses.replace(device, latency=3.0)  # one kernel
    assert slow.seconds(cost, 1e9) == by_memory + 3


def test_fused_attention_never_holds_the_scores(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.bfloat16)
    scores = 2 * 1024 * 1024 * 4

    def gradient(q):
        return jax.grad(lambda q: attend(q, q, q).astype(jnp.float32).sum())(q)

    with planned_for("gpu"):
        fused = program_cost(gradient, q)
    with planned_for("tpu"):
        assert program_cost(gradient, q).peak == fused.peak
    monkeypatch.setenv(VARIABLE, "xla")
    with planned_for("tpu"):
        plain = program_cost(gradient, q)
    assert fused.peak < scores / 8 < scores < plain.peak
    # 2 products forward, 4 backward; the backward one recomputes the scores
    assert plain.flops == 6 * 2 * 2 * 1024**2 * 16 and fused.flops >= plain.flops


def test_parameters_are_those_of_the_files(tmp_path):
    path = tmp_path / "plan.json"
    words = ["plan", "demo", *SMALL, "--device", "h100", "--json", str(path), "--quiet"]
    assert main(words) == 0
    plan = json.loads(path.read_text())
    directory = resource_path("assets", "shapes-diffusion")

    def numbers(part):
        return sum(
            value.size
            for file in (directory / part).glob("*.safetensors")
            for name, value in load_file(file).items()
            if not name.endswith("position_ids")
        )

    unet, memory = 4 * numbers("unet"), plan["memory"]
    assert memory["trained parameters"] == memory["gradient"] == memory["reference"] == unet
    # Two moments and the moving average that the preset keeps.
    assert 3 * unet <= memory["optimizer state"] < 3 * unet + 64
    expected = 4 * (numbers("vae") + numbers("text_encoder"))
    np.testing.assert_allclose(memory["frozen parameters"], expected, rtol=0.05)
    assert plan["fits"] and plan["largest_microbatch"] == 4 and plan["communicated"] == 0
    assert plan["peak"] == sum(
        size for name, size in memory.items() if not name.startswith("while ")
    ) + max(size for name, size in memory.items() if name.startswith("while "))
    assert any("float32 on an accelerator" in line for line in plan["warnings"])


def test_an_old_checkpoint_is_planned_at_the_size_that_it_is_loaded_at(tmp_path):
    source = resource_path("assets", "shapes-diffusion")
    for name in (
        "model_index.json",
        *(f"{p}/config.json" for p in ("unet", "vae", "text_encoder")),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        fields = json.loads((source / name).read_text())
        if name == "unet/config.json":  # Diffusers takes less than 64 for 64 before 0.9
            fields |= {"_diffusers_version": "0.6.0", "sample_size": 32}
        (tmp_path / name).write_text(json.dumps(fields))
    shutil.copytree(source / "scheduler", tmp_path / "scheduler")
    assert find_architecture(str(tmp_path)).unet.sample_size == 64
    fields = json.loads((tmp_path / "unet/config.json").read_text()) | {"in_channels": 9}
    (tmp_path / "unet/config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match="in_channels is 9.*inpainting"):
        find_architecture(str(tmp_path))


@pytest.mark.slow
def test_adapters_of_the_text_encoder_are_counted():
    model = find_architecture("shapes-diffusion")
    lora = [*SMALL, "--model.trainable", "lora", "--model.lora-rank", "4"]
    memory = []
    for trained in ("False", "True"):
        config = load_config("demo", [*lora, "--model.train-text-encoder", trained])
        memory.append(make_plan(config, model, DEVICES["h100"], 1).memory)
    text = model.text_encoder
    added = 4 * 4 * text["num_hidden_layers"] * 4 * 2 * text["hidden_size"]  # q, k, v, out; A, B
    assert memory[1]["trained parameters"] - memory[0]["trained parameters"] == added
    # the encoder is counted once, and its position ids are no parameters
    frozen = [each["frozen parameters"] for each in memory]
    np.testing.assert_allclose(*frozen, rtol=0.01)


def test_a_cpu_holds_what_its_cores_work_on_at_the_same_time(monkeypatch):
    config = load_config("demo", [*SMALL, "--rollout.images-per-prompt", "4"])
    cpu = DEVICES["h100"].__class__("cpu", 1e12, 1e12, 1e11, 1e11, 1e9)
    monkeypatch.setattr("diffusion_grpo.plan.cores", lambda: 2)
    memory = make_plan(config, find_architecture("shapes-diffusion"), cpu, 1).memory
    assert memory["gradient"] == 2 * memory["trained parameters"]


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_a_mend_and_devices_share_the_work():
    config = load_config("demo", SMALL)
    model = find_architecture("shapes-diffusion")
    # the weights and AdamW's two moments alone are more than 20 MB
    tiny = DEVICES["h100"].__class__("gpu", 1e12, 1e12, 1e11, 2e7, 1e9)
    one = make_plan(config, model, tiny, 1)
    assert not one.fits and "--model.trainable lora needs less" in one.warnings[0]
    two = make_plan(config, model, DEVICES["h100"], 2)
    # a ring sends every gradient but the device's own share twice
    assert two.communicated == two.memory["gradient"]
    assert two.memory["while sampling"] < one.memory["while sampling"]
    np.testing.assert_allclose(two.flops["sample"], one.flops["sample"])


TINY = UNetConfig(
    sample_size=8,
    cross_attention_dim=16,
    block_out_channels=(16, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=2,
)
# 16 images in microbatches of 4; 2 steps are learned from, twice.
CALLS = ["--rollout.prompts-per-iteration", "4", "--rollout.images-per-prompt", "4", *SMALL[4:]]
CALLS += ["--rollout.num-steps", "4", "--rollout.window-size", "2", "--grpo.ratio", "step"]
CALLS += ["--grpo.updates-per-rollout", "2", "--grpo.beta", "0"]


def test_a_whole_networks_gradient_is_sent_in_every_call_and_an_adapters_once_an_update():
    model = dataclasses.replace(find_architecture("shapes-diffusion"), unet=TINY)
    ring = 2 * 3 / 4  # of 4 devices: all but the own share of a sum, there and back
    for trained, sums in (("full", 16 // 4 * 2 * 2), ("lora", 2)):
        config = load_config("demo", [*CALLS, "--model.trainable", trained])
        plan = make_plan(config, model, DEVICES["h100"], 4)
        assert plan.communicated == ring * sums * plan.memory["gradient"]
        np.testing.assert_allclose(plan.seconds["communicate"], plan.communicated / 450e9)


def _tiny(**changed):
    """A small UNet and a small autoencoder, of two levels each."""
    vae = VAEConfig(
        block_out_channels=(192, 192),  # decoding takes more than an image's gradient
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    unet = dataclasses.replace(TINY, **changed)
    return dataclasses.replace(find_architecture("shapes-diffusion"), unet=unet, vae=vae)


@pytest.mark.parametrize(
    ("field", "other"),
    [("grpo.microbatch", "rollout.microbatch"), ("rollout.microbatch", "grpo.microbatch")],
)
def test_the_microbatch_that_is_named_is_the_largest_that_fits_all_devices(field, other):
    words = [*CALLS, "--model.trainable", "lora", f"--{other}", "2"]

    def planned(size, memory):
        config = load_config("demo", [*words, f"--{field}", str(size)])
        return make_plan(config, _tiny(), Device("gpu", 1e12, 1e12, 1e11, memory, 1e9), 2)

    fits = planned(4, 1e12)
    refused = planned(16, fits.peak / USABLE + 64)
    assert fits.fits and not refused.fits
    assert f"GiB; {field} 4 fits" in refused.warnings[0]
    if field == "grpo.microbatch":
        assert refused.largest_microbatch == 4


def _memory(**changed):
    """16 images, 8 of them learned from; 100 bytes held, and one image takes 10 in any program."""
    given = {"kept": {"weights": 100}, "gradient": 5, "images": 16, "learned": 8, "slack": 1.0}
    peaks = dict.fromkeys(("sampled", "decoded", "updated"), lambda size: 10 * size)
    return Memory(**given | peaks | {"lanes": lambda number: 1} | changed)


def test_the_program_that_overflows_says_which_microbatch_is_too_large():
    memory = _memory()
    assert memory.parts(4, 2)["while sampling"] == 40
    assert peak_of(memory.parts(4, 2)) == 100 + 5 + 40
    assert memory.fitting(4, 4, 145) == {}
    assert memory.fitting(4, 8, 145) == {"grpo.microbatch": 4}
    assert memory.fitting(8, 4, 145) == {"rollout.microbatch": 4}
    assert memory.fitting(16, 8, 145) == {"grpo.microbatch": 4, "rollout.microbatch": 4}
    assert memory.fitting(1, 1, 114) == {"grpo.microbatch": 0}
    decoded = _memory(decoded=lambda size: 30 * size)
    assert decoded.fitting(4, 4, 145) == {"rollout.microbatch": 1}
    assert decoded.most_differentiated(145) == 4


def test_all_that_is_at_work_at_the_same_time_has_to_fit():
    memory = _memory(lanes=lambda number: min(2, number))
    assert memory.parts(8, 4) == {
        **{"weights": 100, "gradient": 2 * 5},
        **{"while sampling": 2 * 80, "while decoding": 2 * 80, "while updating": 2 * 40},
    }
    # All 8 at once are a gradient of 80 bytes; 4 and 4 are two of 40.
    assert memory.most_differentiated(185) == 8 and memory.most_differentiated(184) == 2
    # Beside one gradient: 16 at once, or two of 8, are the same.
    assert memory.fitting(16, 8, 200) == {"rollout.microbatch": 4}


@pytest.mark.slow
def test_what_is_evaluated_of_the_recorded_steps_is_counted():
    def planned(*words):
        config = load_config("demo", [*CALLS, "--model.trainable", "lora", *words])
        return make_plan(config, _tiny(), DEVICES["h100"], 1)

    plain, steps, active = planned(), 4, 2
    forward = plain.flops["sample"] / steps  # of all images
    penalty = ("--grpo.beta", "0.1", "--grpo.kl")
    for words, sampling, sweeps in (
        # The reference once; the policy once more, in the second update.
        ((*penalty, "k3"), 0, 2),
        # In the reward: of the policy and the reference, or of the reference alone.
        ((*penalty, "exact", "--grpo.kl-in", "reward"), 2, 0),
        ((*penalty, "k2", "--grpo.kl-in", "reward"), 1, 0),
    ):
        plan = planned(*words)
        found = [plan.flops[name] - plain.flops[name] for name in ("sample", "update")]
        expected = [active * forward * number for number in (sampling, sweeps)]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1)
        ratio = plan.seconds["sample"] / plain.seconds["sample"]
        np.testing.assert_allclose(ratio, 1 + sampling * active / steps)


NFT = ["--grpo.algorithm", "nft", "--grpo.kl", "mse", "--grpo.ratio", "trajectory"]


def test_nft_evaluates_two_or_three_policies_and_keeps_clean_latents():
    def planned(*words, devices=1):
        config = load_config("demo", [*CALLS, *NFT, "--nft.timesteps", "3", *words])
        return make_plan(config, _tiny(), DEVICES["h100"], devices)

    plain, penalized = planned(), planned("--grpo.beta", "0.1")
    forward = plain.flops["sample"] / 4  # of all images, once; two updates at 3 timesteps
    extra = (penalized.flops["update"] - plain.flops["update"]) / (2 * 3)
    np.testing.assert_allclose(extra, forward, rtol=0.02)  # the reference
    # the old policy, and the trained one with a backward of twice the products but for the input's
    assert 3.8 < plain.flops["update"] / (2 * 3 * forward) < 4.1
    assert plain.memory["old policy"] == plain.memory["trained parameters"]
    grpo = load_config("demo", CALLS)
    recorded = make_plan(grpo, _tiny(), DEVICES["h100"], 1).memory["trajectories"]
    # of 5 latents a trajectory one is left, twice, in float32
    latent = 4 * int(np.prod((8, 8, 4)))
    assert recorded - plain.memory["trajectories"] == 16 * 2 * latent * (5 - 1)
    # Four calls of 4 images at 3 timesteps, twice, send a gradient each, an adapter's too.
    for trained in ("full", "lora"):
        plan = planned("--model.trainable", trained, devices=4)
        assert plan.communicated == 2 * 3 / 4 * 4 * 3 * 2 * plan.memory["gradient"]


def test_a_size_that_a_run_refuses_is_not_planned():
    size = ["--rollout.height", "72", "--rollout.width", "64"]
    config, model = load_config("demo", [*CALLS, *size]), _tiny()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "block_out_channels": (16,) * 5}
    deep = dataclasses.replace(model.vae, up_block_types=("UpDecoderBlock2D",) * 5, **blocks)
    with pytest.raises(UsageError, match="height is 72 pixels; expected a multiple of 16"):
        make_plan(config, dataclasses.replace(model, vae=deep), DEVICES["h100"], 1)
    config = load_config("demo", CALLS)
    with pytest.raises(UsageError, match="gives no sample_size; set --rollout.height"):
        make_plan(config, _tiny(sample_size=None), DEVICES["h100"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_divided_run_holds_and_sends_what_its_plan_says(trained, algorithm, tmp_path):
    checkpoint = write_pipeline(tmp_path / "pipeline", **TWO_LEVELS)
    changed = {"model__trainable": trained, "mesh__fsdp": 2, "optim__ema_decay": 0.9}
    changed |= {"rollout__prompts_per_iteration": 4, "rollout__num_steps": 3}
    if algorithm == "nft":
        changed |= {"grpo__algorithm": "nft", "grpo__kl": "mse", "grpo__beta": 0.1}
        changed |= {"nft__timesteps": 3}
    config = tiny_run.config(checkpoint, tmp_path, **changed)
    # 16 images in microbatches of 8, one update; the gradient is of all 3 steps, or timesteps.
    plan = make_plan(config, find_architecture(str(checkpoint)), DEVICES["h100"], 4)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    words = [f"{name}={value}" for name, value in changed.items()]
    done = subprocess.run(
        [sys.executable, "tests/plan_run.py", str(checkpoint), str(tmp_path), *words],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "PJRT_NPROC": "8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
    )
    found = json.loads(done.stdout.splitlines()[-1])
    # All that is alive on a device, nothing of it an image yet; text encoders are counted about.
    held = {k: v for k, v in plan.memory.items() if not k.startswith(("while ", "traj"))}
    np.testing.assert_allclose(sum(held.values()), found["alive"], rtol=0.02)
    parts = ["trained parameters", "reference", "gradient", "optimizer state"]
    for part in [*parts, "old policy"] if algorithm == "nft" else parts:
        np.testing.assert_allclose(held[part], found[part], atol=64, err_msg=part)

    def sent(program, calls):
        # results of the collectives: a gathered array over 2 devices, a sum over all 4
        sizes = found[program]
        assert sizes.keys() <= {"all-gather", "all-reduce"}
        return calls * (sizes.get("all-gather", 0) / 2 + 2 * 3 / 4 * sizes.get("all-reduce", 0))

    expected = sent("sample", 2) + sent("accumulate", 2 * 3) + sent("total", 1)
    np.testing.assert_allclose(plan.communicated, expected, rtol=1e-3)
    assert "all-gather" in found["sample"] and "all-gather" in found["accumulate"]
    assert ("all-reduce" in found["accumulate"]) == ((trained, algorithm) != ("lora", "grpo"))


@pytest.mark.slow
def test_sd15_has_the_published_number_of_parameters():
    from flax import nnx

    from diffusion_grpo.models.unet import UNet2DConditionModel

    unet = nnx.eval_shape(
        lambda: UNet2DConditionModel(ARCHITECTURES["sd15"].unet, rngs=nnx.Rngs(0))
    )
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(unet))) == 859_520_964


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h10"], "did you mean 'h100'"),
        (["--devices", "0"], "devices is '0'"),
        (["--mesh.fsdp", "4", "--device", "h100"], "expected --devices 4"),
        (
            ["--mesh.fsdp", "4", "--device", "h100", "--devices", "6"],
            "lays a run over 4 devices, but 6 are planned for",
        ),
        (["--devices", "3", "--device", "h100"], "rollout.microbatch is 32, which 3 devices"),
        (["--json", "a.txt"], "does not end in .json"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, capsys):
    assert main(["plan", "demo", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
