"""Whole runs of the algorithms and their state, on a checkpoint that Diffusers itself wrote."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from torch_checkpoints import TWO_LEVELS, write_pipeline

import diffusion_grpo.learning as learning
import diffusion_grpo.train as train_module
from diffusion_grpo.advantages import RewardHistory, group_advantages, running_advantages
from diffusion_grpo.conditioning import encode_prompts
from diffusion_grpo.config import GRPOOptions, load_config
from diffusion_grpo.consistency import images_sharing_a_prompt
from diffusion_grpo.errors import UsageError
from diffusion_grpo.learner import LearnerState, Rollout, image_advantages, kl_penalty
from diffusion_grpo.learning import make_learner
from diffusion_grpo.metrics import read_metrics
from diffusion_grpo.nft import draw_timesteps
from diffusion_grpo.optim import TrainState
from diffusion_grpo.pipeline import make_policy
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.rollout import image_keys
from diffusion_grpo.train import train

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("learning") / "pipeline"
    return write_pipeline(directory, prediction_type="v_prediction", **TWO_LEVELS)


def config_for(checkpoint, folder, *words):
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\ntwo green stars\n")
    common = f"""--model {checkpoint} --prompts.train {prompts} --prompts.heldout {prompts}
        --reward.rewards jpeg_size --rollout.prompts-per-iteration 2 --rollout.images-per-prompt 4
        --rollout.num-steps 3 --rollout.microbatch 4 --grpo.microbatch 2 --eval.num-prompts 1
        --eval.num-steps 1 --run.iterations 2 --run.sample-every 0 --optim.learning-rate 1e-3
        --rollout.guidance-scale 1 --run.output {folder / "run"}"""
    return load_config(None, [*common.split(), *" ".join(words).split()])


RUNS = {
    "grpo": (
        "--grpo.ratio step --grpo.guard True --grpo.kl k3 --grpo.beta 0.1 --grpo.kl-target 1e-6",
        "--grpo.advantage running --grpo.running-min 2 --grpo.best-and-worst 1",
        "--optim.optimizer lion --optim.schedule cosine --optim.ema-decay 0.5",
        "--rollout.window-size 2 --rollout.window-every 1 --grpo.gradient-steps 1",
    ),
    "noise": (
        "--grpo.learn-noise-scale True --grpo.entropy-coeff 0.01 --grpo.kl exact --grpo.beta 0.1",
        "--grpo.kl-in reward --grpo.ratio-base reference --grpo.timestep-fraction 0.7",
        "--optim.optimizer adafactor",
    ),
    "nft": (
        "--grpo.algorithm nft --rollout.eta 0 --nft.timesteps 2 --grpo.kl mse --grpo.beta 0.1",
        "--optim.ema-decay 0.5",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "noise", "nft")]
)
def test_a_run_that_was_interrupted_ends_as_the_undisturbed_one(
    name, checkpoint, tmp_path, monkeypatch
):
    """With the whole state: averages, old policy, adapted β, running rewards, moments."""
    folders = [tmp_path / "whole", tmp_path / "broken"]
    exported, states = [], [None]

    def export(config, model, policy, trained, directory):
        exported.append(jax.device_get(jax.tree.leaves(trained)))
        return originals["export"](config, model, policy, trained, directory)

    def leaves(state):
        states[-1:] = [jax.device_get(state.train)]
        return originals["leaves"](state)

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # the second iteration is done anew, from the state after the first
            os.kill(os.getpid(), signal.SIGINT)
        return originals["image_advantages"](*arguments, **options)

    calls, originals = [], dict(vars(train_module))
    monkeypatch.setattr(train_module, "export", export)
    monkeypatch.setattr(train_module, "leaves", leaves)
    for folder in folders:
        folder.mkdir()
    whole = config_for(checkpoint, folders[0], *RUNS[name])
    train(whole)
    states.append(None)
    broken = config_for(checkpoint, folders[1], *RUNS[name])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "image_advantages", interrupted)
        train(broken)
    train(broken, resume=True)

    first, second = (load_file(folder / "run" / "final" / UNET) for folder in folders)
    assert all((first[key] == second[key]).all() for key in first)
    rows = [read_metrics(folder / "run") for folder in folders]
    for a, b in zip(*rows, strict=True):
        same = {key for key in a if "time/" not in key and key != "images_per_second"}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
        for key in same:
            assert np.isfinite(a[key])

    # What the run learned from is in its metrics, and what it exports is the average where on.
    directory = folders[0] / "run"
    assert load_config(str(directory / "config.yaml")) == whole
    last = rows[0][-1]
    assert {"kl", "beta", "policy_loss", "grad_norm"} <= last.keys()
    if name == "grpo":
        text = (directory / "config.yaml").read_text()
        assert text.startswith("# clip range: the ratio acts within 0.99")
        assert last["beta"] > rows[0][0]["beta"] == pytest.approx(0.1)
        assert last["learning_rate"] < rows[0][0]["learning_rate"]
        assert last["ratio/max"] != 1 and last["entropy"] != 0
    if name == "nft":
        assert "ratio/mean" not in last and last["old_distance"] > 0
    if name == "noise":
        assert last["noise_scale/max"] != 1
        assert last["kl"] > 0
    train_state = states[0]
    for leaf in jax.tree.leaves(train_state):
        assert np.isfinite(leaf).all()
    average = train_state.params if name == "noise" else train_state.average
    for a, b in zip(jax.tree.leaves(average), exported[0], strict=True):
        np.testing.assert_array_equal(a, b)
    if name != "noise":
        moved = zip(jax.tree.leaves(train_state.params), exported[0], strict=True)
        assert any((a != b).any() for a, b in moved)


def test_the_user_is_told_what_the_options_come_to(checkpoint, tmp_path):
    model = StableDiffusion.from_pretrained(checkpoint)

    def notes(*words):
        config = config_for(checkpoint, tmp_path, *words)
        policy = make_policy(model, guidance_scale=1.0)
        return make_learner(config, policy, model.scheduler_config, (8, 8, 4)).notes

    plain = notes("--grpo.clip-low 1e-4 --grpo.clip-high 2e-4")
    # √(16384/256) · √3 = 13.856
    low, high = 0.9999**13.8564, 1.0002**13.8564
    assert len(plain) == 1
    assert f"within {low:.6g} to {high:.6g} (for a latent of 8 x 8 x 4, 3 steps" in plain[0]
    assert "always 1" in notes("--grpo.updates-per-rollout 1")[1]
    assert "has no effect" in notes("--grpo.entropy-coeff 0.1")[1]
    assert len(notes("--grpo.entropy-coeff 0.1 --grpo.learn-noise-scale True")) == 1
    assert "gradient of mean 0" in notes("--grpo.kl k1 --grpo.beta 0.1")[1]
    assert "within 0.9999 to 1.0001 (as given)" in notes("--grpo.clip-scale none")[0]
    assert notes("--grpo.algorithm nft --nft.timesteps 2") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--grpo.best-and-worst 1 --grpo.beta 0.1 --grpo.updates-per-rollout 2",
        "--rollout.guidance-scale 3 --grpo.kl-in reward --grpo.beta 0.1",
        "--grpo.algorithm nft --nft.timesteps 2 --grpo.kl mse --grpo.beta 0.1",
    ],
)
def test_a_group_learns_as_if_each_image_had_a_prompt_of_its_own(words, checkpoint, tmp_path):
    model = StableDiffusion.from_pretrained(checkpoint)
    config = config_for(checkpoint, tmp_path, words)
    scale = config.rollout.guidance_scale
    group = np.repeat(np.arange(2), 4)
    keys = {p: image_keys(0, 0, group, np.tile(np.arange(4), 2), p) for p in ("step_noise", "loss")}
    noise = jax.random.normal(jax.random.key(0), (8, 8, 8, 4))
    advantages = jnp.asarray([1.0, -1, 0.5, -0.5, 0.3, -1.2, 0, 0.9])

    def learned(images_sharing_a_prompt):
        policy = make_policy(model, guidance_scale=scale)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learning, "images_sharing_a_prompt", images_sharing_a_prompt)
            learner = make_learner(config, policy, model.scheduler_config, (8, 8, 4))
        texts = [("a red circle", "two green stars")[i] for i in group]
        state, conditioning = learner.init(3), encode_prompts(model, texts)
        rollout = learner.sample(state, 0, noise, keys["step_noise"], conditioning)
        drawn = jax.device_get((rollout.final, rollout.kl))
        _, metrics = learner.learn(state, rollout, advantages, 0, keys["loss"])
        assert "grad_norm" in metrics[-1]
        # where ρ is 1 nothing is measured of it: of several updates the first has no such number
        several = config.grpo.algorithm == "grpo" and len(metrics) > 1
        for name in ("clip_fraction", "approx_kl", "ratio/mean"):
            assert not several or [name in each for each in metrics] == [False, True]
        return drawn, jax.device_get(metrics)

    shared = []

    def counted(*arguments):
        shared.append(images_sharing_a_prompt(*arguments))
        return shared[-1]

    together, alone = learned(counted), learned(lambda *_: 1)
    assert shared == [2]
    for ours, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_timesteps_and_their_noise_are_drawn_by_keys_without_a_common_child(
    checkpoint, tmp_path, monkeypatch
):
    """`split(key)[1]` is `fold_in(key, 1)`: of one key, the one would tell of the other."""
    model = StableDiffusion.from_pretrained(checkpoint)
    config = config_for(checkpoint, tmp_path, "--grpo.algorithm nft --nft.timesteps 2")
    learner = make_learner(
        config, make_policy(model, guidance_scale=1.0), model.scheduler_config, (8, 8, 4)
    )
    used = []

    def drawn(keys, *arguments):
        used.append(keys)
        return draw_timesteps(keys, *arguments)

    def update(train, old, reference, frozen, batch, beta, check):
        used.append(batch.keys)
        return train, {"loss": jnp.float32(0)}

    monkeypatch.setattr(learning, "draw_timesteps", drawn)
    monkeypatch.setattr(learner, "_update", update)
    state, keys = learner.init(3), image_keys(0, 0, np.zeros(8, int), np.arange(8), "loss")
    conditioning = encode_prompts(model, ["a red circle"] * 8)
    rollout = learner.sample(state, 0, jnp.zeros((8, 8, 8, 4)), keys, conditioning)
    learner.learn(state, rollout, jnp.ones(8), 0, keys)
    of_timesteps, of_noise = (
        {
            tuple(np.asarray(jax.random.key_data(child)).tolist())
            for key in parents
            for child in (key, *(jax.random.fold_in(key, j) for j in range(3)))
        }
        for parents in used[:2]
    )
    assert len(of_timesteps) == len(of_noise) == 32 and not of_timesteps & of_noise


def test_histories_have_the_names_that_rewards_have_in_the_metrics(checkpoint, tmp_path):
    model = StableDiffusion.from_pretrained(checkpoint)
    words = "--grpo.combine advantages --grpo.advantage running --grpo.best-and-worst None"
    config = config_for(checkpoint, tmp_path, words)
    policy = make_policy(model, guidance_scale=1.0)
    learner = make_learner(config, policy, model.scheduler_config, (8, 8, 4))
    assert set(learner.init(3, {"redness": 1.0}).history) == {"redness"}
    assert set(learner.init(3).history) == {"jpeg_size"}


def test_a_window_beyond_the_steps_with_noise_is_refused_before_anything_is_compiled(
    checkpoint, tmp_path
):
    model = StableDiffusion.from_pretrained(checkpoint)
    scheduler = dataclasses.replace(
        model.scheduler_config, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0
    )
    words = "--rollout.window-size 1 --rollout.window-start 2"
    for algorithm in ("", "--grpo.algorithm nft --nft.timesteps 2"):
        config = config_for(checkpoint, tmp_path, words, algorithm)
        policy = make_policy(model, guidance_scale=1.0)
        with pytest.raises(UsageError, match="only 2 of the 3 steps have noise"):
            make_learner(config, policy, scheduler, (8, 8, 4))


SCORES = {
    "a": np.array([0.1, 0.4, 0.35, 2.0, -1.0, 0.0, 5.7, 5.8], np.float32),
    "b": np.array([30.0, 10.0, 20.0, 0.0, 5.0, 5.0, 5.0, 5.0], np.float32),
}


def advantages(options, total=None, history=None, penalty=None):
    total = 2 * SCORES["a"] - SCORES["b"] if total is None else total
    return image_advantages(
        options,
        SCORES,
        total,
        (2.0, -1.0),
        kept=np.ones(len(total), bool),
        group_size=4,
        prompt_index=np.repeat([1, 0], 4),
        history=history or {},
        penalty=penalty,
    )


def test_advantages_are_of_the_summed_reward_or_of_each():
    total = jnp.asarray(2 * SCORES["a"] - SCORES["b"])
    ours, history = advantages(GRPOOptions())
    np.testing.assert_allclose(ours, group_advantages(total, 4), rtol=1e-6)
    assert history == {}
    ours, _ = advantages(GRPOOptions(combine="advantages"))
    each = [np.asarray(group_advantages(jnp.asarray(s), 4)) for s in SCORES.values()]
    np.testing.assert_allclose(ours, 2 * each[0] - each[1], rtol=1e-5)
    ours, _ = advantages(GRPOOptions(advantage_clip=0.5))
    assert float(jnp.abs(ours).max()) == 0.5
    ours, _ = advantages(GRPOOptions(advantage_eps=0.5))
    groups = np.float64(total).reshape(2, 4)
    want = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 0.5)
    np.testing.assert_allclose(ours, want.ravel(), rtol=1e-5)


def test_weights_are_in_the_order_of_the_rewards_and_not_of_their_names():
    options = GRPOOptions(combine="advantages", advantage="group_mean")
    scores = {"b": np.array([0.0, 2.0], np.float32), "a": np.array([0.0, 20.0], np.float32)}
    ours, _ = image_advantages(
        options,
        scores,
        sum(scores.values()),
        (3.0, 0.5),
        kept=np.ones(2, bool),
        group_size=2,
        prompt_index=np.zeros(2, int),
        history={},
    )
    np.testing.assert_allclose(ours, [-3 * 1 - 0.5 * 10, 3 * 1 + 0.5 * 10], rtol=1e-6)


@pytest.mark.parametrize("kind", ["group_mean", "leave_one_out"])
def test_advantages_in_units_of_the_reward_are_clipped_by_their_own_spread(kind):
    rewards = np.array([0.0, 0.0, 0.0, 100.0, -1.0, 0.0, 0.0, 1.0], np.float32)
    free, _ = advantages(GRPOOptions(advantage=kind), total=jnp.asarray(rewards))
    np.testing.assert_allclose(
        free, group_advantages(jnp.asarray(rewards), 4, kind=kind), rtol=1e-5
    )
    clipped, _ = advantages(
        GRPOOptions(advantage=kind, advantage_clip=1.0), total=jnp.asarray(rewards)
    )
    spread = np.asarray(free).std()  # their mean is 0
    np.testing.assert_allclose(clipped, np.clip(free, -spread, spread), rtol=1e-5)
    thousandth, _ = advantages(
        GRPOOptions(advantage=kind, advantage_clip=1.0), total=jnp.asarray(rewards / 1000)
    )
    np.testing.assert_allclose(1000 * thousandth, clipped, rtol=1e-4)


def test_weights_of_advantages_count_beyond_the_clip():
    options = GRPOOptions(combine="advantages", advantage_clip=1.0)
    ours, _ = advantages(options)
    each = [
        np.clip(np.asarray(group_advantages(jnp.asarray(s), 4)), -1, 1) for s in SCORES.values()
    ]
    np.testing.assert_allclose(ours, 2 * each[0] - each[1], rtol=1e-5)
    assert np.abs(ours).max() > 1


def test_running_advantages_keep_a_history_of_each_reward():
    options = GRPOOptions(advantage="running", combine="advantages", running_min=3)
    empty = {name: RewardHistory.empty(2, 8) for name in SCORES}
    ours, history = advantages(options, history=empty)
    index = np.repeat([1, 0], 4)
    each = [np.asarray(running_advantages(s, index, empty["a"], min_count=3)[0])
            for s in SCORES.values()]  # fmt: skip
    np.testing.assert_allclose(ours, 2 * each[0] - each[1], rtol=1e-5)
    assert set(history) == {"a", "b"} and history["b"].counts.tolist() == [4, 4]
    assert (empty["b"].counts == 0).all()
    # Of the whole history while it is of one batch: (r − mean)/(std + eps), clipped, then weighted.
    options = GRPOOptions(
        advantage="running", running_min=2, advantage_eps=0.5, advantage_clip=0.8,
        combine="advantages",
    )  # fmt: skip
    ours, _ = advantages(options, history=empty)
    want = 0.0
    for weight, scores in zip((2.0, -1.0), SCORES.values(), strict=True):
        groups = np.float64(scores).reshape(2, 4)
        each = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 0.5)
        want += weight * np.clip(each, -0.8, 0.8).ravel()
    np.testing.assert_allclose(ours, want, rtol=1e-5)
    # Of the batch, as long as a prompt has had fewer rewards than asked for.
    options = GRPOOptions(advantage="running", running_min=5, combine="advantages")
    ours, _ = advantages(options, history=empty)
    a, b = (np.float64(scores) for scores in SCORES.values())
    want = 2 * (a - a.mean()) / a.std() - (b - b.mean()) / b.std()
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)


def test_the_kl_is_subtracted_from_the_reward_where_it_is_in_it():
    state = LearnerState(TrainState(None, None), None, jnp.float32(0.5), {})
    rollout: Rollout = Rollout(None, None, None)
    assert kl_penalty(state, rollout) is None
    kl = np.array([0.2, 4.0, 0.0, 1.0, 0.3, 0.1, 2.0, 0.0], np.float32)
    penalty = kl_penalty(state, rollout._replace(kl=jnp.asarray(kl)))
    np.testing.assert_allclose(penalty, 0.5 * kl, rtol=1e-6)
    total = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 1.0, 0.0, 2.0], np.float32)
    groups = (total - 0.5 * kl).reshape(2, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    ours, _ = advantages(GRPOOptions(), total, penalty=penalty)
    np.testing.assert_allclose(ours, expected.reshape(-1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["group", "group_mean", "group_global_std", "leave_one_out"])
def test_a_group_of_equal_rewards_teaches_nothing_though_its_kl_differs(kind):
    """Divided by the group's std, rounding or a tiny β KL would push as hard as a reward."""
    total = np.array([22.13] * 4 + [1.0, 2.0, 3.0, 4.0], np.float32)
    penalty = np.array([5e-7, 7e-7, 9e-7, 1.2e-6] * 2, np.float32)
    ours, _ = advantages(GRPOOptions(advantage=kind), total, penalty=penalty)
    assert (np.asarray(ours[:4]) == 0).all() and (np.asarray(ours[4:]) != 0).all()


@pytest.mark.parametrize("kind", ["group", "running"])
def test_images_of_a_dropped_group_have_no_advantage_and_no_part_in_those_of_others(kind):
    options = GRPOOptions(advantage=kind, running_min=1)
    nothing = np.full(2, np.nan, np.float32)
    total = np.concatenate([nothing, [3.0, 1.0], nothing, [2.0, 6.0]]).astype(np.float32)
    penalty = np.array([9.0, 9.0, 0.5, 0.0, 9.0, 9.0, 0.0, 1.0], np.float32)
    ours, history = image_advantages(
        options,
        {"a": total},
        total,
        (1.0,),
        kept=np.isfinite(total),
        group_size=2,
        prompt_index=np.repeat([0, 1, 2, 3], 2),
        history={"total": RewardHistory.empty(4, 4)} if kind == "running" else {},
        penalty=penalty,
    )
    # Of 2.5 and 1, and of 2 and 5: whatever the spread, two rewards are one std from their mean.
    np.testing.assert_allclose(ours, [0, 0, 1, -1, 0, 0, -1, 1], rtol=1e-5)
    if kind == "running":
        assert history["total"].counts.tolist() == [0, 2, 0, 2]
        np.testing.assert_array_equal(history["total"].values[1, :2], [2.5, 1.0])
        np.testing.assert_array_equal(history["total"].values[3, :2], [2.0, 5.0])
