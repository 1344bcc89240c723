"""`diffusion-grpo evaluate`: rewards of a model on prompts, with intervals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_grpo.commands.common import (
    Talk,
    check_counts,
    check_dtype,
    parse,
    read_prompts,
)
from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import check_output
from diffusion_grpo.run_models import find_models, reward_options, run_prompts
from diffusion_grpo.sampling import SamplingDefaults, check_sampler


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Score what a model draws for prompts at fixed seeds, and compare it with a base.

    Every sampler is evaluated: what users run is deterministic, what training saw is not. Means
    have bootstrap intervals over prompts; the win rate against the base at the same prompts and
    seeds has Wilson's. With a base of the same architecture, the KL to it is measured too.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run, which stands for the model it trained; RUN@best, RUN@base."""
    reward: tuple[str, ...] = ("clip",)
    """Rewards, in the form of train --reward."""
    reward_options: tuple[str, ...] = ()
    """NAME.OPTION=VALUE each; those of the first run hold where nothing else is said."""
    base: str | None = None
    """The model to compare with, as the model is given."""
    prompts: str | None = None
    """Prompt list: a name, a file, or a template; without any, what the first run among model and
    base held out of training (its training list where nothing was), or without a run,
    shapes_heldout. Metadata with a task give a table by task."""
    num_prompts: int = 64
    """At most so many prompts, from the first."""
    num_images: int = 2
    """Images of each prompt; 2 or more measure the diversity."""
    samplers: tuple[str, ...] = ("ddim", "ddpm")
    """ddim (deterministic), ddpm (stochastic), dpm++ and euler."""
    seed: int = 0
    """Seed of the noise."""
    num_steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """T, of the base too; the default is what the model says, or 50."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """s, of the base too; the default is what the model says, or 5."""
    negative_prompt: str | None = None
    """Text of the unconditional half of the guidance; the default is what that model says, or
    none."""
    variant: str | None = None
    """Variant of checkpoints' weight files, such as fp16; without it, RUN@base has the run's."""
    revision: str | None = None
    """Branch, tag or commit of hub repositories; without it, RUN@base has the run's."""
    output: Path = Path("evaluation.json")
    """The numbers; the same name with .md gets them as tables."""
    batch_size: int = 16
    """Images drawn at a time."""
    dtype: str = "float32"
    """Compute dtype: float32 or bfloat16."""
    quiet: bool = False
    """Say nothing but errors and what was written."""
    verbose: bool = False
    """Say more."""


def run(words: Sequence[str]) -> list[Path]:
    """Evaluate and write; returns what was written."""
    options = parse(EvaluateOptions, words, "diffusion-grpo evaluate")
    check_counts(options, "num_prompts", "num_images", "batch_size")
    if not options.samplers:
        raise UsageError("samplers is empty; expected one or more, such as ddim")
    for sampler in options.samplers:
        check_sampler(sampler, 0.0)
    check_dtype(options.dtype)
    names = ("num_steps", "guidance_scale", "negative_prompt")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    SamplingDefaults(**given)  # refuses what is out of bounds before a model is read
    path = check_output(options.output, (".json",))
    check_output(path.with_suffix(".md"), (".md",))
    talk = Talk(options.quiet, options.verbose)
    words = [word for word in (options.model, options.base) if word is not None]
    own = run_prompts(words) if options.prompts is None else None
    if own is None:
        listed = options.prompts or "shapes_heldout"
        prompts = read_prompts((), listed, options.num_prompts)
    else:
        lists = {"held-out": "what the run held out", "training": "the run's training prompts"}
        listed = lists[own.which]
        prompts = list(own.prompts[: options.num_prompts])
    sources = find_models(words, revision=options.revision, variant=options.variant)

    from diffusion_grpo.evaluate import Evaluation
    from diffusion_grpo.evaluation_summary import summarize, to_markdown
    from diffusion_grpo.pipeline import generate
    from diffusion_grpo.pretrained import DTYPES, StableDiffusion, local_directory
    from diffusion_grpo.reward import RewardSet, parse_reward_specs

    places = [
        local_directory(source.place, revision=source.revision, variant=source.variant)
        for source in sources
    ]
    chosen = reward_options(words, options.reward, options.reward_options)
    rewards = RewardSet.load(parse_reward_specs(options.reward, chosen))
    rewards.check(
        [prompt.text for prompt in prompts],
        [prompt.metadata for prompt in prompts],
        group_size=options.num_images,
        what="num_images",
    )
    dtype = DTYPES[options.dtype]
    models = [
        StableDiffusion.from_pretrained(
            place, dtype=dtype, param_dtype=dtype, variant=source.variant
        )
        for place, source in zip(places, sources, strict=True)
    ]
    sampling = dataclasses.replace(models[0].sampling or SamplingDefaults(), **given)
    settings: dict[str, Any] = sampling.settings() | {"seed": options.seed}
    n = options.num_images
    repeated = [prompt for prompt in prompts for _ in range(n)]
    texts = [prompt.text for prompt in repeated]
    metadata = [prompt.metadata for prompt in repeated]
    known = all("task" in one for one in metadata)
    where: dict[str, Any] = {
        "prompt_index": [i for i in range(len(prompts)) for _ in range(n)],
        "image_index": [j for _ in prompts for j in range(n)],
    }
    kl = None
    if len(models) == 2:
        kl = _divergence(options, models, texts, sampling, where, talk)

    sections: dict[str, Any] = {}
    for sampler in options.samplers:
        found = []
        for source, model in zip(sources, models, strict=True):
            with talk.progress(f"{source.place}, {sampler}", len(texts)) as count:
                images = generate(
                    model,
                    texts,
                    sampler=sampler,
                    batch_size=options.batch_size,
                    on_images=count,
                    **settings,
                    **where,
                )
            result = rewards(images, texts, metadata, group_size=n)
            found.append(
                Evaluation(
                    images,
                    texts,
                    result.scores,
                    result.total,
                    trained_on=len(result.scores),
                    images_per_prompt=n,
                    tasks=[str(one["task"]) for one in metadata] if known else None,
                    kl=None if found else kl,
                    lower=tuple(name for name, w in rewards.weight_of.items() if w < 0),
                )
            )
        base = found[1] if len(found) == 2 else None
        sections[sampler] = summarize(found[0], base)
        if base is not None:
            sections[f"{sampler}, base"] = summarize(base)
    made = {"model": options.model, "base": options.base, "prompts": listed}
    table = path.with_suffix(".md")
    text = to_markdown(f"Evaluation of {options.model}", sections)
    numbers = made | settings | {"samplers": sections}
    talk.say(text)  # first: a disk may be full
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    table.write_text(text, encoding="utf-8")
    return [path, table]


def _divergence(
    options: EvaluateOptions,
    models: Sequence[Any],
    texts: Sequence[str],
    sampling: SamplingDefaults,
    where: dict[str, Any],
    talk: Talk,
) -> float | None:
    """Return the KL of the model to its base along the model's stochastic trajectories.

    Each has the prompts as its own text encoders encode them. None, and a line that says why, where
    the UNets are of different shapes or the noise schedules differ.
    """
    import jax
    import numpy as np

    from diffusion_grpo.conditioning import encode_prompts, of_rows
    from diffusion_grpo.evaluate import make_trajectory_kl
    from diffusion_grpo.pipeline import TrainablePolicy, latent_shape, padded_chunks
    from diffusion_grpo.rollout import image_keys, initial_noise
    from diffusion_grpo.schedule import make_schedule

    model, base = models
    policies = [TrainablePolicy(one.unet, sampling.guidance_scale) for one in models]
    shapes = [jax.tree.map(lambda leaf: leaf.shape, policy.trained) for policy in policies]
    if shapes[0] != shapes[1] or model.scheduler_config != base.scheduler_config:
        talk.say("no KL to the base: its UNet or its noise schedule is another")
        return None
    schedule = make_schedule(model.scheduler_config, sampling.num_steps, eta=1.0)
    measure = make_trajectory_kl(policies[0], schedule, "mean", policies[1])
    shape = latent_shape(model, sampling.height, sampling.width)
    conditionings = [
        encode_prompts(
            one,
            texts,
            negative_prompt=sampling.negative_prompt,
            shape=shape,
            clip_skip=sampling.clip_skip,
        )
        for one in models
    ]
    index = np.array(where["prompt_index"]), np.array(where["image_index"])
    start = image_keys(options.seed, 0, *index, "evaluation_initial")
    initial = initial_noise(start, shape)
    keys = image_keys(options.seed, 0, *index, "evaluation_step")
    parts = [
        np.asarray(
            measure(
                policies[0].trained,
                initial[rows],
                keys[rows],
                *(of_rows(conditioning, rows) for conditioning in conditionings),
            )
        )
        for rows in padded_chunks(len(texts), options.batch_size)
    ]
    return float(np.concatenate(parts)[: len(texts)].mean())
