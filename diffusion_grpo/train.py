"""The run: prompts → encode → rollout → decode → reward → advantages → update, and again.

`train` reads top to bottom like that line. Everything it calls is pure functions over arrays, or
prepared once before the loop; only this module, `preparation.py`, `results.py` and `cli.py` know of
files, progress and loggers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_grpo.checkpoint import Checkpoints
from diffusion_grpo.config import Config, RolloutConfig
from diffusion_grpo.evaluate import Evaluation, Evaluator
from diffusion_grpo.grpo import group_advantages, uninformative_groups
from diffusion_grpo.images import image_grid, save_image
from diffusion_grpo.interrupt import StopRequest
from diffusion_grpo.metrics import MetricsLog, Progress
from diffusion_grpo.pipeline import encode_prompts, latent_shape, make_decoder, make_policy
from diffusion_grpo.preparation import (
    check_directory,
    check_prompts,
    decode_and_score,
    kept_advantages,
    load_model,
    lora_options,
    make_directory,
    make_optimizer,
    make_reference,
    make_rollout,
)
from diffusion_grpo.pretrained import check_layout, local_directory
from diffusion_grpo.prompts import Prompt, load_heldout, prompt_batch, upcoming_prompts
from diffusion_grpo.recorder import Recorder
from diffusion_grpo.results import (
    describe,
    export,
    save_evaluation_grid,
    save_results,
    update_metrics,
)
from diffusion_grpo.reward import RewardSet
from diffusion_grpo.rollout import image_keys, initial_noise
from diffusion_grpo.schedule import Schedule, make_schedule, step_weights
from diffusion_grpo.trackers import check_trackers
from diffusion_grpo.update import LossConfig, TrainState, UpdateBatch, make_update


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        before: the evaluation of the untrained model.
        after: that of the trained one, same prompts and noise.
        directory: the run's.
    """

    before: Evaluation
    after: Evaluation
    directory: Path


def train(
    config: Config, *, resume: bool = False, quiet: bool = False, verbose: bool = False
) -> Result:
    """Fine-tune a checkpoint's UNet against rewards by GRPO.

    Args:
        config: the run; validated.
        resume: go on from the last checkpoint in `config.run.output`.
        quiet: show no progress.
        verbose: show every iteration.

    Returns:
        The evaluations before and after. The run directory holds `config.yaml`, `metrics.jsonl`,
        `samples/`, `checkpoints/`, `evaluation.json` and `final/`, the exported pipeline.

    Raises:
        UsageError: something asked for cannot be done; found before any work where it can be.
        RewardError: a reward failed. The finished iterations are saved as a checkpoint; if it was
            in an evaluation between iterations, the resumed run goes on without that evaluation.
    """
    # What can be wrong is found first, cheapest first.
    config.validate()
    sources = config.prompts
    prompts, heldout = load_heldout(sources.train, sources.heldout, sources.heldout_share)
    gold_specs = config.gold_rewards()
    source = local_directory(config.model.pretrained)
    check_layout(source)
    directory = check_directory(config, resume)
    settings = config.reward_settings()
    rewards = RewardSet.load(config.training_rewards(), **settings)
    gold = RewardSet.load(gold_specs, **settings) if gold_specs else None
    check_prompts(config, prompts, heldout, rewards, gold)
    check_trackers(config)
    model = load_model(config, source)
    make_directory(config, directory)

    # The policy, its optimizer, and the compiled pieces of an iteration.
    options, rollout, seed = config.grpo, config.rollout, config.run.seed
    policy = make_policy(
        model, guidance_scale=rollout.guidance_scale, lora=lora_options(config), seed=seed
    )
    optimizer, learning_rate = make_optimizer(config.optim, options.updates_per_rollout)
    loss = LossConfig(
        ratio=options.ratio,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        reduction=options.log_prob_reduction,
        beta=options.beta,
        microbatch=options.microbatch,
    )
    update = make_update(policy.denoiser, loss, optimizer)
    draw = make_rollout(config, policy.denoiser)
    refer = make_reference(config, policy.denoiser) if options.beta else None
    decode = make_decoder(model)
    shape = latent_shape(model, rollout.height, rollout.width)
    evaluator = Evaluator(config, model, policy, heldout, rewards, gold)
    reference = policy.trained
    # A copy: the update donates its state, and the reference must outlive it.
    trained = jax.tree.map(jnp.copy, reference)
    state = TrainState(trained, optimizer.init(trained))

    checkpoints = Checkpoints(directory / "checkpoints")
    start = 0
    if resume and checkpoints.latest is not None:
        start = checkpoints.latest
        restored = checkpoints.restore(leaves(state))["leaves"]
        state = jax.tree.unflatten(jax.tree.structure(state), restored)
    again = f"diffusion-grpo train --resume {shlex.quote(str(directory))}"
    log = MetricsLog(directory)
    log.truncate_after(start - 1)

    with (
        contextlib.closing(checkpoints),
        log,
        Progress(config.run.iterations, start=start, quiet=quiet, verbose=verbose) as progress,
        Recorder(config, directory, start=start) as recorder,
        StopRequest() as stop,
    ):
        progress.message(f"evaluating before training on {evaluator.description}")
        with checkpoints.kept(start, leaves(state), resume=again):
            before = evaluator(reference)
        progress.message(describe(before, "before"))
        recorder.evaluation(0, before)
        save_evaluation_grid(before, directory / "samples" / "before.png", "before training")

        done = encoded = start
        for iteration in range(start, config.run.iterations):
            began = time.perf_counter()

            # prompts: P of them, G images each, group by group
            batch = prompt_batch(prompts, seed, iteration, rollout.prompts_per_iteration)
            index, texts, metadata, group = lay_out(batch, rollout.images_per_prompt)
            if iteration >= encoded:
                left = range(iteration, config.run.iterations)
                rows, encoded = upcoming_prompts(prompts, seed, left, rollout.prompts_per_iteration)
                ahead = [*(prompts[i].text for i in rows), rollout.negative_prompt]
                embeddings = encode_prompts(model, ahead)
            conditioning = (embeddings[np.array([rows[i] for i in index])], embeddings[-1:])

            # rollout, decode, reward: host rewards score a chunk while the next one is drawn
            schedule = make_schedule(
                model.scheduler_config,
                rollout.num_steps,
                eta=rollout.eta,
                stochastic_steps=noisy_steps(rollout, iteration),
            )
            weights = step_weights(schedule, options.step_weights)
            active = active_steps(schedule, weights)
            first = np.zeros_like(group) if rollout.same_initial_noise else group
            start_keys = image_keys(seed, iteration, index, first, "initial_noise")
            step_keys = image_keys(seed, iteration, index, group, "step_noise")
            noise = initial_noise(start_keys, shape)
            group_size = rollout.images_per_prompt
            with (
                checkpoints.kept(iteration, leaves(state), resume=again),
                rewards.start(texts, metadata, group_size=group_size, may_drop=True) as scoring,
            ):
                chunks: list[jax.Array] = []
                trajectory = draw(
                    state.params,
                    policy.frozen,
                    schedule,
                    noise,
                    step_keys,
                    conditioning,
                    on_chunk=partial(decode_and_score, decode, chunks, scoring),
                )
                images = jnp.concatenate(chunks)
                images.block_until_ready()
                sampled = time.perf_counter()
                result = scoring.result()
            for note in result.notes:
                progress.message(note)

            # advantages, within each group
            advantages = kept_advantages(
                partial(
                    group_advantages,
                    group_size=group_size,
                    kind=options.advantage,
                    eps=options.advantage_eps,
                    clip=options.advantage_clip,
                ),
                result,
            )
            scored = time.perf_counter()

            # update
            means = (
                refer(reference, policy.frozen, schedule, trajectory.latents, conditioning, active)
                if refer
                else None
            )
            data = UpdateBatch(trajectory, conditioning, advantages, means)
            history = []
            for number in range(options.updates_per_rollout):
                steps = choose_steps(active, options.gradient_steps, (seed, iteration, number))
                state, values = update(
                    state,
                    policy.frozen,
                    schedule,
                    data,
                    weights,
                    active,
                    steps,
                    on_policy=number == 0,
                )
                history.append(values)
            history = jax.device_get(history)
            updated = time.perf_counter()

            # report
            metrics = {
                **result.metrics(),
                **update_metrics(history),
                "advantage/mean": float(advantages.mean()),
                "advantage/std": float(advantages.std()),
                "advantage/zero_groups": float(
                    uninformative_groups(jnp.asarray(result.total[result.kept]), group_size).mean()
                ),
                "learning_rate": learning_rate(iteration),
                "time/sample": sampled - began,
                "time/reward": scored - sampled,
                "time/update": updated - scored,
                "time/iteration": updated - began,
                "images_per_second": rollout.num_images / (updated - began),
            }
            done = iteration + 1
            recorder.rollout(
                iteration,
                np.asarray(images),
                texts,
                {"total": result.total} | result.scores,
                np.asarray(advantages),
                rollout.images_per_prompt,
            )
            stopped = None
            try:
                if evaluation_due(config, done):
                    with checkpoints.kept(done, leaves(state), resume=again):
                        evaluation = evaluator(state.params)
                    metrics |= {f"eval/{k}": v for k, v in evaluation.metrics().items()}
                    metrics["time/evaluate"] = time.perf_counter() - updated
                    progress.message(describe(evaluation, f"iteration {done}"))
                    recorder.evaluation(done, evaluation)
                    stopped = recorder.stop_reason()
                    if config.eval.keep_best and recorder.is_best(done):
                        export(config, model, policy, state.params, directory / "best")
            finally:  # the iteration is done, whatever comes of its evaluation
                if done % config.run.log_every == 0:
                    log.write(iteration, metrics)
                    recorder.metrics(iteration, metrics)
            if config.run.sample_every and done % config.run.sample_every == 0:
                grid = image_grid(
                    np.asarray(images),
                    [prompt.text for _, prompt in batch],
                    columns=rollout.images_per_prompt,
                    title=f"iteration {done}: reward {metrics['reward/mean']:.4f}",
                )
                save_image(directory / "samples" / f"iteration_{done:05d}.png", grid)
            if config.run.save_every and done % config.run.save_every == 0:
                checkpoints.save(done, leaves(state))
            progress.update(done, metrics)
            if stopped:
                progress.message(stopped)
                break
            if stop.requested and done < config.run.iterations:
                checkpoints.save(done, leaves(state))
                progress.message(f"stopped; go on with: {again}")
                raise KeyboardInterrupt

        checkpoints.save(done, leaves(state))
        with checkpoints.kept(done, leaves(state), resume=again):
            after = evaluator(state.params)
        progress.message(describe(after, "after"))
        recorder.evaluation(done, after)
        save_results(config, directory, before, after)
        export(config, model, policy, state.params, directory / "final")
        progress.message(recorder.settle_best(done))
    return Result(before, after, directory)


def leaves(state: TrainState) -> dict[str, list[jax.Array]]:
    """Return the training state as a checkpoint holds it."""
    return {"leaves": jax.tree.leaves(state)}


def evaluation_due(config: Config, done: int) -> bool:
    """Whether to evaluate after `done` iterations; after the last one the run does anyway."""
    every = config.eval.every
    return every > 0 and done % every == 0 and done < config.run.iterations


def lay_out(
    batch: Sequence[tuple[int, Prompt]], images_per_prompt: int
) -> tuple[np.ndarray, list[str], list[dict[str, Any]], np.ndarray]:
    """Repeat each prompt G times, group by group.

    Returns prompt indices, texts, metadata and image indices, `[P·G]` each.

    A prompt that stands in the batch twice is two groups with different noise.
    """
    index, texts, metadata, group = [], [], [], []
    seen: dict[int, int] = {}
    for place, prompt in batch:
        offset = seen.get(place, 0)
        seen[place] = offset + images_per_prompt
        index += [place] * images_per_prompt
        texts += [prompt.text] * images_per_prompt
        metadata += [prompt.metadata] * images_per_prompt
        group += range(offset, offset + images_per_prompt)
    return np.asarray(index), texts, metadata, np.asarray(group)


def noisy_steps(rollout: RolloutConfig, iteration: int) -> list[bool] | None:
    """Return which steps have noise, and so a density and a gradient; None for all.

    A moving window visits its T − size + 1 positions in turn, from the one configured on.
    """
    if rollout.window_size is None:
        return None
    positions = rollout.num_steps - rollout.window_size + 1
    moved = iteration // rollout.window_every if rollout.window_every else 0
    start = (rollout.window_start + moved) % positions
    return [start <= i < start + rollout.window_size for i in range(rollout.num_steps)]


def active_steps(schedule: Schedule, weights: jax.Array) -> jax.Array:
    """Return the steps that have a gradient: with noise, and a weight above 0; `[A]` in order."""
    active = np.asarray(schedule.stochastic) & (np.asarray(weights) > 0)
    return jnp.asarray(np.flatnonzero(active), jnp.int32)


def choose_steps(active: jax.Array, count: int | None, draw: tuple[int, int, int]) -> jax.Array:
    """Choose the denoising steps to differentiate, uniformly without replacement.

    Args:
        active: the steps in play, `[A]`.
        count: K; None takes all.
        draw: what the draw is a function of: seed, iteration, number of the update.

    Returns:
        Step numbers `[min(A, K)]`, in order.
    """
    if count is None or count >= len(active):
        return active
    chosen = np.random.default_rng(draw).choice(np.asarray(active), count, replace=False)
    return jnp.asarray(np.sort(chosen), jnp.int32)
