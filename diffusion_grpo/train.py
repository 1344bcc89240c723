"""The run: prompts → encode → rollout → decode → reward → advantages → update, and again.

`train` reads top to bottom like that line. Nearly all that it calls is pure functions over arrays,
or prepared once before the loop. What the run writes goes through `checkpoint.py`, `run_output.py`
and `results.py`; no function of the algorithm knows of files, progress or trackers. With several
processes, each of them runs all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from diffusion_grpo.checkpoint import Checkpoints, closed, template_of
from diffusion_grpo.conditioning import by_rows_of, encode_prompts, prompts_at_once
from diffusion_grpo.config import Config
from diffusion_grpo.divided_scoring import load_rewards, start_scoring
from diffusion_grpo.errors import RunError
from diffusion_grpo.evaluate import Evaluation, Evaluator
from diffusion_grpo.faults import explained, nonfinite_message, phase
from diffusion_grpo.fitting import fitted_here, is_open
from diffusion_grpo.hub import commits_kept
from diffusion_grpo.interrupt import StopRequest
from diffusion_grpo.learner import Learner, LearnerState, image_advantages, kl_penalty
from diffusion_grpo.learning import make_learner
from diffusion_grpo.mesh import (
    by_rows,
    divided,
    join_rows,
    make_mesh,
    of_all_processes,
    own_places,
    place_module,
    placement,
    replicated,
    shard_order,
    use,
)
from diffusion_grpo.metrics import MetricsLog
from diffusion_grpo.microbatches import decoded_and_scored
from diffusion_grpo.pipeline import TrainablePolicy, latent_shape, make_decoder, make_policy
from diffusion_grpo.preparation import (
    at_commit,
    check_alike,
    check_directory,
    check_lists,
    check_prompts,
    describe_lists,
    load_model,
    lora_options,
    named_by,
    open_directory,
)
from diffusion_grpo.pretrained import StableDiffusion, check_layout, local_directory
from diffusion_grpo.processes import leads, of_leader
from diffusion_grpo.prompts import (
    Prompt,
    load_heldout,
    overlap_note,
    prompt_batch,
    upcoming_prompts,
)
from diffusion_grpo.results import export, group_metrics, update_metrics
from diffusion_grpo.reward_record import (
    RewardRecord,
    describe_rewards,
    edited_rewards,
    read_record,
)
from diffusion_grpo.rollout import image_keys, initial_noise
from diffusion_grpo.run_output import RunOutput, starting
from diffusion_grpo.text_encoding import pipeline_parts
from diffusion_grpo.trackers import check_trackers


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
    """Fine-tune a checkpoint against rewards by GRPO.

    Args:
        config: the run; validated.
        resume: go on from the last checkpoint in `config.run.output`.
        quiet: show no progress.
        verbose: show every iteration.

    Returns:
        The evaluations before and after. The run directory holds `config.yaml`, `prompts.json`,
        `rewards.json`, `metrics.jsonl`, `events.jsonl`, `samples/`, `checkpoints/`,
        `evaluation.json` and `final/`, the exported pipeline.

    Raises:
        UsageError: something asked for cannot be done; found before any work where it can be.
        RewardError: a reward failed. The finished iterations are saved as a checkpoint; an
            evaluation that it was in is done anew when the run is resumed.
        RunError: the disk, the device's memory or numbers that are not finite stopped it.
        Preempted: SIGTERM did, and everything is saved.
    """
    config.validate()
    with use(make_mesh(config)):
        return _train(config, resume=resume, quiet=quiet, verbose=verbose)


def _train(config: Config, *, resume: bool, quiet: bool, verbose: bool) -> Result:
    """Do what `train` says, on the devices of the context."""
    # What can be wrong is found first, cheapest first.
    sources = config.prompts
    directory = Path(config.run.output)
    origin = directory / "config.yaml" if resume else None
    with named_by(origin):
        prompts, heldout = load_heldout(sources.train, sources.heldout, sources.heldout_share)
    lists = describe_lists(prompts, heldout)
    check_alike(config, lists)
    if leads():
        check_directory(config, resume)
        if resume:
            check_lists(config, lists)
    with named_by(origin):
        source = local_directory(
            config.model.pretrained, revision=config.model.revision, variant=config.model.variant
        )
        check_layout(source)
    config = at_commit(config, source)
    settings = config.reward_settings()
    starting("loading the rewards", quiet=quiet)
    gold_specs = config.gold_rewards()
    recorded = read_record(directory) if resume else RewardRecord({}, {})
    with named_by(origin), commits_kept(recorded.commits) as commits:
        rewards = load_rewards(config.training_rewards(), **settings)
        gold = load_rewards(gold_specs, **settings) if gold_specs else None
    check_prompts(config, prompts, heldout, rewards, gold)
    check_trackers(config)
    record = describe_rewards(config, commits)
    if is_open(config):
        starting("predicting what fits the memory", quiet=quiet)
    config, notes = fitted_here(config, source)
    check_alike(config, lists)
    starting(f"loading {config.model.pretrained}", quiet=quiet)
    with phase("loading the model"):
        model = load_model(config, source)
        for network in (model.text_encoder, model.text_encoder_2, model.vae):
            if network is not None:
                place_module(network, replicated)

    # The policy, its algorithm, and the compiled pieces of an iteration.
    options, rollout, seed = config.grpo, config.rollout, config.run.seed
    policy, learner, shape = make_policy_and_learner(config, model)
    decode = make_decoder(model)
    evaluator = Evaluator(config, model, policy, heldout, rewards, gold)
    state = learner.init(len(prompts), rewards.weight_of)
    at_once = prompts_at_once(model)

    # The directory, and what a run before left there.
    notes = [*notes, *learner.notes]
    lock = open_directory(config, directory, notes, lists=lists, rewards=record, resume=resume)
    notes += edited_rewards(recorded, record)
    checkpoints = Checkpoints(
        directory / "checkpoints", keep=config.run.keep_checkpoints, writes=leads()
    )
    again = f"diffusion-grpo train --resume {shlex.quote(str(directory))}"
    start = 0
    evaluated = heldout[: config.eval.num_prompts]
    if sources.heldout is not None and (note := overlap_note(prompts, evaluated)):
        notes = [*notes, note]
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock)
        if resume and of_leader(checkpoints.latest, "the last checkpoint") is not None:
            template, structure = template_of(leaves(state)), jax.tree.structure(state)
            del state  # what is restored takes its place in memory
            with phase("restoring the checkpoint"):
                start, restored, damaged = checkpoints.restore(template)
            state = jax.tree.unflatten(structure, restored["leaves"])
            notes = [*notes, *damaged]
        elif resume:
            notes = [*notes, "there is no checkpoint yet: it begins with the first iteration"]
        log = MetricsLog(directory) if leads() else None
        if log is not None:
            log.truncate_after(start - 1)
        stack.pop_all()

    with (
        lock,
        explained(directory, checkpoints, again),
        closed(checkpoints),
        RunOutput(
            config,
            directory,
            log,
            start=start,
            quiet=quiet,
            verbose=verbose,
            gold=gold.weight_of if gold else None,
        ) as output,
        StopRequest() as stop,
    ):
        learner.check = evaluator.check = stop.check
        for note in notes:
            output.message(note)
        output.message(f"evaluating before training on {evaluator.description}")
        with checkpoints.kept(start, leaves(state), resume=again), phase("evaluation"):
            before = evaluator(policy.trained)
        output.before(before)

        def evaluate(
            done: int, metrics: dict[str, Any], since: float
        ) -> tuple[str | None, float | None]:
            """Evaluate within the run; as `RunOutput.evaluation`."""
            try:
                with checkpoints.kept(done, leaves(state), resume=again), phase("evaluation"):
                    evaluation = evaluator(state.train.evaluated)
                found = output.evaluation(done, evaluation, metrics, since)
                if found[1] is not None:
                    export(config, model, policy, state.train.evaluated, directory / "best")
            finally:  # the iteration is done, whatever comes of its evaluation
                output.metrics(done - 1, metrics)
            return found

        done = encoded = start
        if start and evaluation_due(config, start):
            metrics = output.unevaluated()
            if metrics is not None:
                evaluate(start, metrics, time.perf_counter())
        if stopped := output.stop_reason():  # it was ended between this and its end
            output.message(stopped)
        for iteration in range(start, start if stopped else config.run.iterations):
            if stop.agreed():  # here the state is whole, and saved or made anew in no time
                checkpoints.save(iteration, leaves(state))
                checkpoints.wait()
                raise stop.stopped(again)
            began = time.perf_counter()

            # prompts: P of them, G images each, group by group
            batch = prompt_batch(prompts, seed, iteration, rollout.prompts_per_iteration)
            index, texts, metadata, group = lay_out(batch, rollout.images_per_prompt)
            if iteration >= encoded:
                left = range(iteration, config.run.iterations)
                rows, encoded = upcoming_prompts(
                    prompts, seed, left, rollout.prompts_per_iteration, most=at_once
                )
                encoded_prompts = encode_prompts(
                    model,
                    [prompts[i].text for i in rows],
                    negative_prompt=rollout.negative_prompt,
                    shape=shape,
                    clip_skip=config.model.clip_skip,
                    tokens=policy.reads_tokens,
                )
            conditioning = by_rows_of(encoded_prompts, np.array([rows[i] for i in index]))

            # rollout, decode, reward: host rewards score a chunk while the next one is drawn
            group_size = rollout.images_per_prompt
            # Of a prompt that stands twice in the batch, each group has a noise of its own.
            of_group = group // group_size * group_size
            first = of_group if rollout.same_initial_noise else group
            start_keys = by_rows(image_keys(seed, iteration, index, first, "initial_noise"))
            step_keys = by_rows(image_keys(seed, iteration, index, group, "step_noise"))
            noise = initial_noise(start_keys, shape)
            own, order = own_places(len(group)), shard_order(len(group), rollout.images_at_once)
            with (
                checkpoints.kept(iteration, leaves(state), resume=again),
                phase("sampling"),
                start_scoring(
                    rewards,
                    texts[own],
                    metadata[own],
                    group_size=group_size,
                    may_drop=True,
                    order=order,
                ) as scoring,
            ):
                chunks: list[jax.Array] = []
                drawn = learner.sample(
                    state,
                    iteration,
                    noise,
                    step_keys,
                    conditioning,
                    output=decoded_and_scored(decode, chunks, scoring, stop.check),
                )
                images = join_rows(chunks)
                chunks.clear()
                jax.block_until_ready((images, drawn.kl))
                sampled = time.perf_counter()
                result = scoring.result()
            for note in result.notes:
                output.message(note)

            # advantages, within each group
            advantages, history = image_advantages(
                options,
                result.scores,
                result.total,
                rewards.weights,
                penalty=kl_penalty(state, drawn),
                kept=result.kept,
                group_size=group_size,
                prompt_index=index,
                history=state.history,
            )
            scored = time.perf_counter()

            # update
            loss_keys = by_rows(image_keys(seed, iteration, index, group, "loss"))
            with checkpoints.kept(iteration, leaves(state), resume=again), phase("the update"):
                if iteration == start and (drift := learner.probe(state, drawn)):
                    output.message(drift)
                state, updates = learner.learn(
                    state._replace(history=history), drawn, advantages, iteration, loss_keys
                )
            updated = time.perf_counter()

            # report
            metrics = {
                **result.metrics(),
                **update_metrics(updates),
                "advantage/mean": float(advantages.mean()),
                "advantage/std": float(advantages.std()),
                **group_metrics(result.total, advantages, result.kept, group_size),
                "learning_rate": learner.learning_rate(iteration),
                "time/sample": sampled - began,
                "time/reward": scored - sampled,
                "time/update": updated - scored,
                "time/iteration": updated - began,
                "images_per_second": rollout.num_images / (updated - began),
            }
            done = iteration + 1
            metrics |= output.rollout(iteration, images, texts, result, advantages)
            if config.run.sample_every and done % config.run.sample_every == 0:
                each = [prompt.text for _, prompt in batch]
                output.samples(done, images, each, metrics["reward/mean"])
            stopped = quality = None
            if evaluation_due(config, done):
                stopped, quality = evaluate(done, metrics, time.perf_counter())
            elif done % config.run.log_every == 0 or done == config.run.iterations:
                output.metrics(iteration, metrics)
            if save_due(config, done) or quality is not None:
                checkpoints.save(done, leaves(state), quality=quality)
            output.update(done, metrics)
            skipped = int(state.train.nonfinite)
            if skipped > config.run.max_nonfinite:
                checkpoints.save(done, leaves(state))
                raise RunError(nonfinite_message(skipped, config.run.max_nonfinite))
            if stopped:
                output.message(stopped)
                break
            del drawn, images, scoring, conditioning  # while the next are drawn

        checkpoints.save(done, leaves(state))
        with checkpoints.kept(done, leaves(state), resume=again), phase("evaluation"):
            after = evaluator(state.train.evaluated)
        output.after(done, before, after)
        export(config, model, policy, state.train.evaluated, directory / "final")
        output.settle(done)
        checkpoints.wait()
    return Result(before, after, directory)


def make_policy_and_learner(
    config: Config, model: StableDiffusion
) -> tuple[TrainablePolicy, Learner, tuple[int, int, int]]:
    """Return the policy on its devices, its algorithm, and the shape of a latent.

    Args:
        config: the run's.
        model: the pipeline. Those of its networks that the policy consists of are made to hold the
            policy's arrays, as they were laid out on the devices.
    """
    options, rollout = config.grpo, config.rollout
    policy = make_policy(
        model,
        guidance_scale=rollout.guidance_scale,
        lora=lora_options(config),
        clip_skip=config.model.clip_skip,
        noise_steps=rollout.num_steps if options.learn_noise_scale else None,
        seed=config.run.seed,
    )
    policy.trained = placement(full=config.model.trainable == "full")(policy.trained)
    policy.frozen = divided(policy.frozen)
    # The networks would otherwise keep their arrays beside those that were laid out anew.
    for name, part in pipeline_parts(policy.network(policy.trained)).items():
        nnx.update(getattr(model, name), nnx.state(part))
    shape = latent_shape(model, rollout.height, rollout.width)
    return policy, make_learner(config, policy, model.scheduler_config, shape), shape


def leaves(state: LearnerState) -> dict[str, list[Any]]:
    """Return the training state as a checkpoint holds it, its arrays those of all processes."""
    return {"leaves": [of_all_processes(leaf) for leaf in jax.tree.leaves(state)]}


def evaluation_due(config: Config, done: int) -> bool:
    """Whether to evaluate after `done` iterations; after the last one the run does anyway."""
    every = config.eval.every
    return every > 0 and done % every == 0 and done < config.run.iterations


def save_due(config: Config, done: int) -> bool:
    """Whether to save after `done` iterations; after the last one the run does anyway."""
    every = config.run.save_every
    return every > 0 and done % every == 0


def lay_out(
    batch: Sequence[tuple[int, Prompt]], images_per_prompt: int
) -> tuple[np.ndarray, list[str], list[dict[str, Any]], np.ndarray]:
    """Repeat each prompt G times, group by group.

    A prompt that stands in the batch twice makes two groups, whose image indices (and so their
    noise) differ.

    Args:
        batch: P prompts, each with its place in the prompt list.
        images_per_prompt: G.

    Returns:
        Prompt indices, texts, metadata and image indices, `[P·G]` each.
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
