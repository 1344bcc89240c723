"""What a run puts together: that each part gets what it should, compared with Diffusers or by hand.

The parts have tests of their own; here, that images are drawn for the prompts that they are scored
for, that the reference is the base, and that options reach the place where they act.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch_checkpoints import TWO_LEVELS, write_pipeline

import diffusion_grpo.train as train_module
from diffusion_grpo.conditioning import encode_prompts
from diffusion_grpo.config import load_config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Gallery
from diffusion_grpo.learning import make_learner
from diffusion_grpo.pipeline import make_policy
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.programs import noise_steps
from diffusion_grpo.recorder import Recorder
from diffusion_grpo.rollout import denoising_step, image_keys, initial_noise
from diffusion_grpo.steps import choose_steps, update_draw
from diffusion_grpo.train import train

PROMPTS = ("a red circle", "a blue square", "two green stars")
LATENT = (8, 8, 4)
KEEP = """
import numpy as np
from pathlib import Path

def kept(images, prompts, metadata):
    folder = Path({folder!r})
    number = len(list(folder.iterdir()))
    np.savez(folder / f"{{number:03d}}.npz", images=images, prompts=np.array(prompts))
    return images.mean(axis=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wiring") / "pipeline"
    return write_pipeline(directory, prediction_type="v_prediction", **TWO_LEVELS)


def config_for(checkpoint, folder, *words):
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    common = f"""--model {checkpoint} --prompts.train {prompts} --prompts.heldout {prompts}
        --reward.rewards jpeg_size --rollout.prompts-per-iteration 2 --rollout.images-per-prompt 2
        --rollout.num-steps 3 --rollout.microbatch 4 --grpo.microbatch 4 --eval.num-prompts 3
        --eval.num-steps 3 --run.iterations 2 --run.sample-every 0 --run.report False
        --run.tensorboard off --rollout.guidance-scale 1 --run.output {folder / "run"}"""
    return load_config(None, [*common.split(), *" ".join(words).split()])


def encoded(pipe, texts, clip_skip):
    """The states of a layer before the last, as in Diffusers (Transformers 5 moved a name)."""
    ids = pipe.tokenizer(
        list(texts), padding="max_length", max_length=pipe.tokenizer.model_max_length
    )["input_ids"]
    states = pipe.text_encoder(torch.tensor(ids), output_hidden_states=True).hidden_states
    module = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    return module.final_layer_norm(states[-(clip_skip + 1)])


@torch.no_grad()
def drawn_by_diffusers(directory, prompts, noise, *, clip_skip=0, negative="", guidance_scale=1.0):
    pipe = StableDiffusionPipeline.from_pretrained(directory)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2))
    images = pipe(
        prompt_embeds=encoded(pipe, prompts, clip_skip),
        negative_prompt_embeds=encoded(pipe, [negative] * len(prompts), 0),  # never skipped there
        latents=latents,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    return 255 * images


def test_an_image_is_drawn_for_the_prompt_that_it_is_scored_for(checkpoint, tmp_path):
    folder, reward = tmp_path / "kept", tmp_path / "kept.py"
    folder.mkdir()
    reward.write_text(KEEP.format(folder=str(folder)))
    config = config_for(
        checkpoint,
        tmp_path,
        "--grpo.algorithm nft --rollout.eta 0 --grpo.kl mse --grpo.beta 0 --nft.timesteps 1",
        "--optim.learning-rate 1e-9 --rollout.guidance-scale 3 --model.clip-skip 1",
        f"--rollout.negative-prompt blurry --reward.rewards {reward} --run.seed 7 --eval.seed 5",
    )
    train(config, quiet=True)
    calls = [np.load(file) for file in sorted(folder.iterdir())]
    assert [len(call["prompts"]) for call in calls] == [3, 4, 4, 3]
    options = {"guidance_scale": 3.0, "clip_skip": 1, "negative": "blurry"}
    seen = []
    for number, call in enumerate(calls):
        prompts = call["prompts"].tolist()
        index = np.array([PROMPTS.index(text) for text in prompts])
        if number in (0, 3):
            assert index.tolist() == [0, 1, 2]
            keys = image_keys(5, 0, index, np.zeros(3, int), "evaluation_initial")
        else:
            assert index[0] == index[1] != index[2] == index[3]
            keys = image_keys(7, number - 1, index, np.array([0, 1, 0, 1]), "initial_noise")
            seen.append(np.asarray(initial_noise(keys, LATENT)))
        expected = drawn_by_diffusers(checkpoint, prompts, initial_noise(keys, LATENT), **options)
        np.testing.assert_allclose(call["images"], expected, atol=2)
    # The noise is another one in each iteration, and for each image.
    assert np.abs(seen[0] - seen[1]).max(axis=(1, 2, 3)).min() > 0.5
    assert np.abs(seen[0][0] - seen[0][1]).max() > 0.5


def test_a_group_shares_its_initial_noise_with_no_other_one(checkpoint, tmp_path, monkeypatch):
    drawn, made = [], train_module.initial_noise

    def recorded(*arguments):
        drawn.append(np.asarray(made(*arguments)))
        return made(*arguments)

    monkeypatch.setattr(train_module, "initial_noise", recorded)
    # Four prompts an iteration, of three: one stands in it twice.
    words = "--rollout.same-initial-noise True --rollout.prompts-per-iteration 4"
    train(config_for(checkpoint, tmp_path, words, "--rollout.microbatch 8"), quiet=True)
    assert [len(noise) for noise in drawn] == [8, 8]
    for noise in drawn:
        groups = noise.reshape(4, 2, -1)
        np.testing.assert_array_equal(groups[:, 0], groups[:, 1])
        apart = np.abs(groups[:, None, 0] - groups[None, :, 0]).max(axis=2)
        assert (apart[~np.eye(4, dtype=bool)] > 0.5).all()
    assert np.abs(drawn[0] - drawn[1]).max(axis=(1, 2, 3)).min() > 0.5


def moved(tree, size=0.05):
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), tree)


def learner_for(checkpoint, folder, *words):
    config = config_for(checkpoint, folder, *words)
    model = StableDiffusion.from_pretrained(checkpoint)
    scale, steps = config.rollout.guidance_scale, noise_steps(config)
    policy = make_policy(model, guidance_scale=scale, noise_steps=steps)
    learner = make_learner(config, policy, model.scheduler_config, LATENT)
    conditioning = encode_prompts(model, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2)
    index, group = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    keys = {name: image_keys(0, 0, index, group, name) for name in ("step_noise", "loss")}
    noise = initial_noise(image_keys(0, 0, index, group, "initial_noise"), LATENT)
    return learner, conditioning, noise, keys


ADVANTAGES = jnp.asarray([1.0, -1.0, 0.5, -0.5])


@pytest.mark.slow
def test_the_reference_of_a_run_is_the_base_wherever_training_has_come(checkpoint, tmp_path):
    learner, conditioning, noise, keys = learner_for(
        checkpoint, tmp_path, "--grpo.beta 0.1 --grpo.kl exact --grpo.updates-per-rollout 2"
    )
    policy, state = learner.policy, learner.init(3)
    params = moved(state.train.params)
    state = state._replace(train=state.train._replace(params=jax.tree.map(jnp.copy, params)))
    rollout = learner.sample(state, 0, noise, keys["step_noise"], conditioning)
    trajectory = jax.device_get(rollout.batch.trajectory)
    _, metrics = learner.learn(state, rollout, ADVANTAGES, 0, keys["loss"])

    expected, schedule = 0.0, rollout.schedule
    for i in np.asarray(rollout.plan.active):
        means = [
            np.asarray(
                denoising_step(
                    policy.denoiser(tree, policy.frozen),
                    schedule,
                    int(i),
                    jnp.asarray(trajectory.latents[i]),
                    conditioning,
                )[0],
                np.float64,
            )
            for tree in (params, policy.trained)
        ]
        std = float(schedule.std[i])
        expected += np.square(means[0] - means[1]).mean(axis=(1, 2, 3)).mean() / (2 * std**2)
    assert expected > 1e-4
    assert float(metrics[0]["kl"]) == pytest.approx(expected, rel=1e-3)
    # The second update begins elsewhere than the rollout was drawn, and its ratio is measured.
    assert abs(float(metrics[1]["ratio/max"]) - 1) > 1e-5 and float(metrics[1]["approx_kl"]) > 0
    assert "approx_kl" not in metrics[0]


def test_a_moving_window_that_comes_to_no_step_is_refused_at_once(checkpoint, tmp_path):
    words = "--rollout.window-size 1 --grpo.step-weights given --grpo.given-weights 1 1 0"
    learner_for(checkpoint, tmp_path, words)
    with pytest.raises(UsageError, match="weight"):
        learner_for(checkpoint, tmp_path, words, "--rollout.window-every 100")


@pytest.mark.parametrize(
    ("words", "factor"),
    [
        ("--grpo.advantage group", 1.0),
        ("--grpo.advantage leave_one_out", 1 / np.sqrt(0.625)),  # of ADVANTAGES, √(mean A²)
        ("--grpo.combine advantages --reward.rewards jpeg_size=3 sharpness=-1", 0.25),
    ],
)
def test_nft_has_advantages_in_standard_deviations(
    words, factor, checkpoint, tmp_path, monkeypatch
):
    learner, conditioning, noise, keys = learner_for(
        checkpoint, tmp_path, "--grpo.algorithm nft --nft.timesteps 1 --rollout.eta 0", words
    )
    given = []

    def update(train, old, reference, frozen, batch, beta, *, check):
        given.append(np.asarray(batch.advantages))
        return train, {"loss": jnp.float32(0)}

    monkeypatch.setattr(learner, "_update", update)
    state = learner.init(3)
    rollout = learner.sample(state, 0, noise, keys["step_noise"], conditioning)
    learner.learn(state, rollout, ADVANTAGES, 0, keys["loss"])
    np.testing.assert_allclose(given[0], factor * np.asarray(ADVANTAGES), rtol=1e-5)


def test_nft_draws_with_the_old_policy_and_lets_it_follow(checkpoint, tmp_path, monkeypatch):
    learner, conditioning, noise, keys = learner_for(
        checkpoint,
        tmp_path,
        "--grpo.algorithm nft --grpo.kl mse --grpo.beta 0.1 --rollout.eta 0 --nft.timesteps 2",
        "--nft.decay 0.9 --nft.decay-rise 0.02 --grpo.updates-per-rollout 1",
    )
    given = {}

    def update(train, old, reference, frozen, batch, beta, *, check):
        given.update(old=old, reference=reference, images=len(batch.advantages))
        return train._replace(params=jax.tree.map(lambda x: x + 1, train.params)), {
            "kl": jnp.float32(0)
        }

    drawing = learner._draw

    def draw(parameters, *rest, **options):
        given["drawing"] = parameters
        return drawing(parameters, *rest, **options)

    monkeypatch.setattr(learner, "_update", update)
    monkeypatch.setattr(learner, "_draw", draw)
    initial = learner.init(3)
    for iteration, decay in ((0, 0.0), (10, 0.2), (100, 0.9)):
        old, new = moved(initial.old, 0.1), moved(initial.train.params, 0.3)
        held = jax.device_get(old)
        state = initial._replace(old=old, train=initial.train._replace(params=new))
        rollout = learner.sample(state, iteration, noise, keys["step_noise"], conditioning)
        assert given["drawing"] is state.old
        following, _ = learner.learn(state, rollout, ADVANTAGES, iteration, keys["loss"])
        assert given["old"] is old and given["reference"] is learner.policy.trained
        assert given["images"] == 4
        leaves = map(jax.tree.leaves, (held, new, following.old))
        for a, b, c in zip(*leaves, strict=True):
            expected = decay * np.asarray(a) + (1 - decay) * (np.asarray(b) + 1)
            np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-6)


def test_a_rollout_has_the_policy_s_own_noise_and_is_kept_as_asked_for(checkpoint, tmp_path):
    words = "--grpo.learn-noise-scale True --rollout.storage-dtype bfloat16"
    learner, conditioning, noise, keys = learner_for(checkpoint, tmp_path, words)
    state = learner.init(3)

    def first_step(scale):
        params = state.train.params | {"log_noise_scale": jnp.log(jnp.full(3, scale))}
        told = state._replace(train=state.train._replace(params=params))
        trajectory = learner.sample(
            told, 0, noise, keys["step_noise"], conditioning
        ).batch.trajectory
        assert trajectory.latents.dtype == jnp.bfloat16
        return np.asarray(trajectory.latents[1], np.float32)

    # From one x_T the mean of the step is the same, and what is added to it grows with the scale.
    one, two, three = map(first_step, (1.0, 2.0, 3.0))
    assert np.abs(two - one).max() > 0.1
    np.testing.assert_allclose(three - two, two - one, atol=0.02 * np.abs(three).max())


def test_options_reach_the_plan_the_schedule_and_the_loss(checkpoint, tmp_path):
    def learner(*words):
        return learner_for(checkpoint, tmp_path, *words)[0]

    plain = learner()
    schedule, plan = plain.schedule(0), plain.plan(plain.schedule(0), 0)
    assert plan.dual_clip is None and np.asarray(plan.discounts).tolist() == [1, 1, 1]
    assert np.asarray(plan.active).tolist() == [0, 1, 2]
    assert (np.asarray(schedule.std) > 0).tolist() == [True] * 3
    config = plain.loss.config
    assert (config.reduction, config.guard, config.dppo_kl) == ("mean", False, None)

    steps = learner("--grpo.ratio step --grpo.gamma 0.5 --grpo.dual-clip 3")
    plan = steps.plan(steps.schedule(0), 0)
    assert np.asarray(plan.discounts).tolist() == [0.25, 0.5, 1.0]
    assert steps.loss.config.ratio == "step"
    assert float(plan.dual_clip) == pytest.approx(3 ** (16384 / 256) ** 0.5)  # as the clip range

    for iteration in range(3):
        part = learner("--grpo.timestep-fraction 0.4")
        chosen = np.asarray(part.plan(part.schedule(0), iteration).active)
        assert len(chosen) == 1  # 0.4 of 3
    window = learner("--rollout.window-size 1 --rollout.window-start 0 --rollout.window-every 2")
    noisy = [np.flatnonzero(np.asarray(window.schedule(i).std)).tolist() for i in range(6)]
    assert noisy == [[0], [0], [1], [1], [2], [2]]

    config = learner("--grpo.log-prob-reduction sum").loss.config
    assert config.reduction == "sum"
    config = learner("--grpo.ratio step --grpo.guard True").loss.config
    assert config.guard and config.dppo_kl is None
    config = learner("--grpo.ratio step --grpo.dppo-kl 0.2").loss.config
    assert config.dppo_kl == 0.2 and not config.guard
    config = learner("--grpo.ratio-base reference").loss.config
    assert config.ratio_base == "reference" and config.needs_reference_log_probs


def test_as_many_steps_are_differentiated_as_asked_for(checkpoint, tmp_path, monkeypatch):
    learner, conditioning, noise, keys = learner_for(
        checkpoint, tmp_path, "--grpo.gradient-steps 2 --grpo.updates-per-rollout 3"
    )
    given = []

    def update(train, frozen, schedule, batch, plan, beta, *, on_policy, check):
        given.append((np.asarray(plan.steps).tolist(), on_policy))
        measured = ("clip_fraction", "approx_kl", "ratio/mean", "kl")
        return train, dict.fromkeys(measured, jnp.float32(0))

    monkeypatch.setattr(learner, "_update", update)
    state = learner.init(3)
    for iteration in range(4):
        rollout = learner.sample(state, iteration, noise, keys["step_noise"], conditioning)
        learner.learn(state, rollout, ADVANTAGES, iteration, keys["loss"])
    assert [on_policy for _, on_policy in given] == 4 * [True, False, False]
    chosen = [tuple(steps) for steps, _ in given]
    assert all(len(set(steps)) == 2 and set(steps) <= {0, 1, 2} for steps in chosen)
    draws = [update_draw(0, iteration, number) for iteration in range(4) for number in range(3)]
    assert chosen == [tuple(choose_steps(jnp.arange(3), 2, draw).tolist()) for draw in draws]
    assert len(set(chosen)) == 3  # each pair comes in twelve draws, but for one case in forty


def test_beta_is_adapted_to_the_mean_kl_of_an_iteration_s_updates(checkpoint, tmp_path):
    learner, *_ = learner_for(
        checkpoint, tmp_path, "--grpo.beta 0.5 --grpo.kl exact --grpo.kl-target 0.02"
    )
    measured = [{"kl": 0.0195}, {"kl": 0.0225}]  # 5 % above the target, and so β rises by 0.5 %
    state, metrics = learner._with_beta(learner.init(3), measured)
    assert float(state.beta) == pytest.approx(0.5 * 1.005, rel=1e-5)
    assert [each["beta"] for each in metrics] == [0.5, 0.5]  # what they were taken with


def test_each_update_of_nft_noises_the_images_anew(checkpoint, tmp_path, monkeypatch):
    learner, conditioning, noise, keys = learner_for(
        checkpoint,
        tmp_path,
        "--grpo.algorithm nft --nft.timesteps 2 --rollout.eta 0 --grpo.updates-per-rollout 3",
    )
    given = []

    def update(train, old, reference, frozen, batch, beta, *, check):
        given.append(np.asarray(jax.random.key_data(batch.keys)))
        return train, {"loss": jnp.float32(0)}

    monkeypatch.setattr(learner, "_update", update)
    state = learner.init(3)
    rollout = learner.sample(state, 0, noise, keys["step_noise"], conditioning)
    learner.learn(state, rollout, ADVANTAGES, 0, keys["loss"])
    assert len({tuple(key) for key in np.concatenate(given).tolist()}) == 3 * 4


@pytest.mark.slow
def test_what_is_exported_is_what_was_evaluated(checkpoint, tmp_path, monkeypatch):
    # Both would be removed, or not be written, if the other one were better.
    monkeypatch.setattr(Recorder, "is_best", lambda self, done: True)
    monkeypatch.setattr(Recorder, "settle_best", lambda self, done: "kept")
    reward = tmp_path / "bright.py"
    reward.write_text("def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    config = config_for(
        checkpoint,
        tmp_path,
        f"--reward.rewards {reward} --optim.ema-decay 0.5 --optim.learning-rate 0.02",
        "--model.trainable full --eval.every 1 --eval.seed 5 --grpo.updates-per-rollout 2",
    )
    train(config, quiet=True)
    run = Path(config.run.output)
    found = json.loads((run / "evaluation.json").read_text())["rewards"]["bright"]
    gallery = Gallery(run)
    evaluations = {entry.iteration: entry for entry in gallery.entries("evaluation")}
    means = {done: entry.numbers("total").mean() for done, entry in evaluations.items()}
    keys = image_keys(5, 0, np.arange(3), np.zeros(3, int), "evaluation_initial")
    noise = initial_noise(keys, LATENT)
    drawn = {
        name: drawn_by_diffusers(place, PROMPTS, noise, guidance_scale=1.0).mean()
        for name, place in (("base", checkpoint), ("best", run / "best"), ("final", run / "final"))
    }
    assert drawn["base"] == pytest.approx(found["before"], abs=0.3)
    assert drawn["final"] == pytest.approx(found["after"], abs=0.3)
    assert drawn["best"] == pytest.approx(means[1], abs=0.3)
    values = sorted(drawn.values())
    assert min(np.diff(values)) > 1  # they are three different models
