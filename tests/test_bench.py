"""`diffusion-grpo bench` at the smallest geometry, and the peer beside it."""

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_grpo.bench import describe, table
from diffusion_grpo.cli import main
from diffusion_grpo.commands.bench import BenchOptions, bench_config
from diffusion_grpo.config import load_config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.flops import count_flops
from diffusion_grpo.learning import make_learner
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.models.vae import VAEConfig
from diffusion_grpo.peer import Peer, PeerError, check_options, check_unet
from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.published import ARCHITECTURES, random_module
from diffusion_grpo.schedule import SchedulerConfig
from diffusion_grpo.workload import Workload

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
VAE = VAEConfig(block_out_channels=(16, 16), norm_num_groups=8)
VAE = dataclasses.replace(
    VAE, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
)
SMALLEST = ["--prompts", "1", "--images-per-prompt", "2", "--steps", "2", "--microbatch", "2"]


@pytest.fixture
def tiny_sd15(monkeypatch):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 100}
    small = dataclasses.replace(
        ARCHITECTURES["sd15"], unet=TINY, vae=VAE, text_encoder=text, tokens=5
    )
    monkeypatch.setitem(ARCHITECTURES, "sd15", small)


@pytest.mark.slow
def test_bench_measures_the_phases_with_random_weights(tiny_sd15, tmp_path, capsys):
    path = tmp_path / "bench.json"
    words = ["sd15", *SMALLEST, "--height", "16", "--width", "16", "--dtype", "float32"]
    phases = ["sample", "decode", "reward", "update", "iteration"]
    words += ["--phases", *phases, "--repeats", "1", "--json", str(path), "--clip", "shapes-clip"]
    assert main(["bench", *words]) == 0
    record = json.loads(path.read_text())
    assert record["clip"]["images"] == 64 and record["clip"]["difference"] < 1e-2
    assert record["clip"]["device_seconds"] > 0 and record["clip"]["host_seconds"] > 0
    assert list(record["seconds"]) == phases
    for phase in record["seconds"].values():
        assert 0 < phase["median"] < phase["first"] * 100
    # guidance, so that an image is two UNet evaluations a step
    assert record["work"]["images"] == 2 and record["work"]["guidance_scale"] == 5.0
    flops = record["flops"]
    assert flops["sample"] == 2 * 2 * flops["forward"]
    # an adapter needs the gradient of activations, and hardly any of weights
    assert 1.9 < flops["forward_backward"] / flops["forward"] < 2.4
    assert record["mfu"]["update"] > 0 and record["memory"]["update_temporary"] > 0
    shown = capsys.readouterr().out
    assert "policy steps/s" in shown and shown.strip().endswith(str(path))


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ({"steps": 1}, "uniform"),
        ({"window": 1}, "uniform"),
        ({"window": 2}, "gain"),
        ({"window": 0}, "gain"),
        ({}, "gain"),
    ],
)
def test_a_single_step_can_be_measured(words, weights):
    config = bench_config(BenchOptions("sd15", **words), random=True)
    assert config.grpo.step_weights == weights


@pytest.mark.parametrize(("here", "said"), [(8, ", 1 of 8 devices used, "), (1, "), float32")])
def test_bench_says_that_it_uses_one_device_of_several(monkeypatch, here, said):
    monkeypatch.setattr(jax, "local_device_count", lambda: here)
    work = object.__new__(Workload)  # not prepared: no network is run
    work.config, work.shape = load_config("demo", []), (8, 8, 4)
    work.learner = SimpleNamespace(steps_learned=(3, 2))
    record = describe(work)
    assert record["device"]["count"] == 1 and record["device"]["available"] == here
    (first, *_) = table(record).splitlines()
    assert first.startswith("1 x ") and said in first


def test_nft_can_be_measured():
    config = bench_config(BenchOptions("demo", algorithm="nft"), random=False)
    assert (config.grpo.algorithm, config.grpo.kl, config.grpo.beta) == ("nft", "mse", 0.01)
    assert bench_config(BenchOptions("demo"), random=False).grpo.algorithm == "grpo"


NFT = ["--grpo.algorithm", "nft", "--grpo.kl", "mse", "--grpo.ratio", "trajectory"]


@pytest.mark.parametrize(
    ("words", "sample", "update"),
    [
        # 8 images of 4 steps, 2 of which are learned from twice; forward 1, with backward 100.
        ([], 8 * 4, 8 * 2 * 2 * 100),
        (["--grpo.beta", "1", "--grpo.kl", "k3"], 8 * 4, 8 * 2 * (2 * 100 + 1 + 1)),
        (["--grpo.beta", "1", "--grpo.kl-in", "reward"], 8 * (4 + 2 * 2), 8 * 2 * 2 * 100),
        # DiffusionNFT at 3 timesteps; what other policies evaluate is in the same program.
        ([*NFT, "--nft.timesteps", "3"], 8 * 4, 8 * 2 * 3 * 100),
    ],
)
def test_evaluations_of_recorded_steps_are_counted(words, sample, update, monkeypatch):
    small = ["--rollout.prompts-per-iteration", "2", "--rollout.images-per-prompt", "4"]
    small += ["--rollout.num-steps", "4", "--rollout.window-size", "2", "--rollout.microbatch", "8"]
    small += ["--grpo.best-and-worst", "None", "--grpo.microbatch", "8", "--grpo.ratio", "step"]
    small += ["--grpo.step-weights", "uniform", "--grpo.updates-per-rollout", "2"]
    small += ["--grpo.beta", "0"]
    work = object.__new__(Workload)  # not prepared: no network is run
    work.config = load_config("demo", [*small, *words])
    monkeypatch.setattr(Workload, "network_flops", lambda self: (1.0, 100.0))
    policy = TrainablePolicy(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), 1.0)
    scheduler = SchedulerConfig.from_dict(ARCHITECTURES["sd15"].scheduler)
    work.learner = make_learner(work.config, policy, scheduler, (8, 8, 4))
    found = work.flops()
    assert (found["sample"], found["update"]) == (sample, update)


@pytest.mark.slow
def test_bench_takes_turns_with_pytorch_on_the_embedded_model(tmp_path):
    path = tmp_path / "bench.json"
    # Four steps: the window begins at the second, and of its two the weights drop the last.
    words = ["demo", *SMALLEST, "--steps", "4", "--window", "2"]
    words += ["--phases", "iteration", "--repeats", "2"]
    words += ["--against", "torch", "--peer-modes", "eager", "--json", str(path)]
    assert main(["bench", *words]) == 0
    peer = json.loads(path.read_text())["peers"]["eager"]
    assert len(peer["pairs"]) == 2 and "error" not in peer
    for phase, ratio in peer["ratios"].items():
        sides = [[pair[side][phase] for side in ("ours", "theirs")] for pair in peer["pairs"]]
        np.testing.assert_allclose(ratio["pairs"], [theirs / ours for ours, theirs in sides])


def test_a_peer_that_stops_is_told_in_its_own_words(tmp_path):
    program = tmp_path / "peer.py"
    program.write_text("raise SystemExit('no such device')\n")
    with Peer([sys.executable, str(program)], {}, time.monotonic() + 60) as peer:
        with pytest.raises(PeerError, match="it ended with code 1: no such device"):
            peer.ready()


def test_a_peer_that_is_late_is_given_up(tmp_path):
    program = tmp_path / "peer.py"
    program.write_text("import time\ntime.sleep(60)\n")
    with Peer([sys.executable, str(program)], {}, time.monotonic() + 0.1) as peer:
        with pytest.raises(PeerError, match="took longer"):
            peer.ready()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phases", "updat"], "did you mean 'update'"),
        (["--repeats", "0"], "repeats is 0"),
        (["--json", "a.txt"], "does not end in .json"),
        (["--against", "torch", "--peer", "nowhere.py"], "give its path with --peer"),
        (["--microbatch", "7"], "expected a divisor"),
        (["--against", "torch", "--peer-python", "nowhere"], "'nowhere', which is no program"),
        (["--against", "torch", "--updates", "2"], "one update a rollout"),
        (["--against", "torch", "--reward", "clip"], "'clip', which the peer does not compute"),
        (["--clip", "shapes-clop"], "shapes-clop"),
        (["sd16"], "did you mean 'sd15'"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr("diffusion_grpo.bench.measure", None)  # nothing was measured for nothing
    assert main(["bench", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--grpo.algorithm nft --grpo.kl mse --grpo.step-weights uniform", "knows GRPO alone"),
        ("--model.trainable lora --model.train-text-encoder True", "trains the UNet alone"),
        ("--grpo.ratio step --grpo.guard True", "grpo.guard is True, which the peer"),
        ("--grpo.ratio step --grpo.dppo-kl 0.1", "grpo.dppo_kl is 0.1"),
        ("--grpo.ratio-base reference", "ratio_base is 'reference'.* expected 'old'"),
        ("--grpo.kl-in reward --grpo.beta 1", "grpo.kl_in is 'reward'"),
        ("--grpo.learn-noise-scale True", "grpo.learn_noise_scale is True"),
        ("--optim.optimizer lion", "optim.optimizer is 'lion'.* expected 'adamw'"),
    ],
)
def test_work_that_the_peer_would_leave_out_is_not_compared(words, message):
    check_options(load_config("demo", []))
    with pytest.raises(UsageError, match=message):
        check_options(load_config("demo", words.split()))


def test_a_network_that_the_peer_cannot_run_is_not_compared():
    check_unet(ARCHITECTURES["sd15"].unet)
    with pytest.raises(UsageError, match="addition_embed_type is 'text_time'"):
        check_unet(ARCHITECTURES["sdxl"].unet)


def test_the_table_is_shown_before_the_peer_is_asked(monkeypatch, capsys, tmp_path):
    record = {"seconds": {}, "work": {}, "device": {}}
    shown = []
    unet = SimpleNamespace(config=TINY)
    monkeypatch.setattr(
        "diffusion_grpo.preparation.load_model", lambda *_: SimpleNamespace(unet=unet)
    )
    monkeypatch.setattr("diffusion_grpo.workload.Workload", lambda *_, **__: None)
    monkeypatch.setattr("diffusion_grpo.bench.measure", lambda *_, **__: record)
    monkeypatch.setattr("diffusion_grpo.bench.table", lambda _: "the table")

    def compare(*_, command, on_result, **__):
        shown.append((capsys.readouterr().out, command[0]))
        on_result(record | {"peers": {}})

    monkeypatch.setattr("diffusion_grpo.peer.compare", compare)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["bench", "demo", "--against", "torch", "--json=~/b.json"]) == 0
    assert shown == [("the table\n", sys.executable)]
    assert json.loads((tmp_path / "b.json").read_text()) == record | {"peers": {}}
    assert capsys.readouterr().out.strip() == str(tmp_path / "b.json")


def test_operations_are_those_that_pytorch_counts():
    ours = random_module(UNet2DConditionModel, TINY, dtype=jnp.float32, param_dtype=jnp.float32)
    graphdef, state = nnx.split(ours)
    times, text = jnp.ones(2, jnp.int32), jnp.ones((2, 5, 16))

    def forward(state, x):
        return nnx.merge(graphdef, state)(x, times, text)

    x = jnp.ones((2, 8, 8, 4))
    config = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(TINY).items()
    }
    theirs = TorchUNet(**config)
    inputs = torch.ones(2, 4, 8, 8, requires_grad=True), torch.ones(2), torch.ones(2, 5, 16)

    def counted(backward):
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            out = theirs(*inputs).sample.sum()
            if backward:
                out.backward()
        return counter.get_total_flops()

    assert count_flops(forward, state, x) == counted(False)
    both = count_flops(jax.grad(lambda s, x: forward(s, x).sum(), argnums=(0, 1)), state, x)
    assert abs(both / counted(True) - 1) < 0.02


def test_a_loop_counts_as_often_as_it_runs():
    a = jnp.ones((3, 3))
    assert count_flops(lambda a: jax.lax.fori_loop(0, 5, lambda _, x: x @ a, a), a) == 5 * 2 * 27
    assert count_flops(lambda a: jax.vmap(jnp.dot)(a, a), a) == 3 * 2 * 3


def test_random_weights_keep_the_size_of_what_goes_through():
    unet = random_module(UNet2DConditionModel, TINY, dtype=jnp.float32, param_dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    graphdef, state = nnx.split(unet)
    run = jax.jit(lambda state, *given: nnx.merge(graphdef, state)(*given))
    out = run(state, x, jnp.ones(2, jnp.int32), jnp.ones((2, 5, 16)))
    assert 0.05 < float(out.std()) < 20
