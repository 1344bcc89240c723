"""`diffusion-grpo compare`: models side by side, and a run as a time-lapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from diffusion_grpo.commands.common import Talk, check_counts, check_dtype, parse, read_prompts
from diffusion_grpo.commands.models import find_model, label, reward_options
from diffusion_grpo.comparison import comparison_grid, time_lapse_frames, time_lapse_strip
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Gallery
from diffusion_grpo.grids import TEXT_SIZE
from diffusion_grpo.images import check_image_path, save_animation, save_image
from diffusion_grpo.sampling import SamplingDefaults, check_sampler


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Draw two to four models at the same prompts and seeds, side by side.

    A run directory stands for the model it trained, RUN@best for its best and RUN@base for what it
    started from; a run alone is compared with its base. With --strip or --animation, the pictures
    that a run recorded at its evaluations are shown over time, and no model is needed.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Checkpoints or runs."""
    output: Path | None = Path("compare.png")
    """The picture to write: .png, .webp or .jpg."""
    strip: Path | None = None
    """Of one run: a picture of fixed prompts over its evaluations."""
    animation: Path | None = None
    """Of one run: the same as an animated .webp."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    prompts: str | None = None
    """A prompt list instead; without any, a run's own held-out list."""
    num_prompts: int = 6
    """At most so many prompts, from the first."""
    num_images: int = 1
    """Images of each prompt."""
    reward: tuple[str, ...] = ()
    """Rewards whose weighted total stands under each picture, in the form of train --reward; a
    tick or a cross where all totals are 0 or 1."""
    reward_options: tuple[str, ...] = ()
    """NAME.OPTION=VALUE each; those of the first run hold where nothing else is said."""
    seed: int = 0
    """Seed of the noise, the same for all models."""
    sampler: str = "ddim"
    """ddim, ddpm, dpm++ or euler."""
    num_steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """T; the default is what the first checkpoint says, or 50."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """s; the default is what the first checkpoint says, or 5."""
    eta: float = 0.0
    """η of the sampler ddim."""
    negative_prompt: str = ""
    """Text of the unconditional half of the guidance."""
    font_size: int = TEXT_SIZE
    """Of the captions, in pixels."""
    batch_size: int = 16
    """Images drawn at a time."""
    dtype: str = "float32"
    """Compute dtype: float32 or bfloat16."""
    quiet: bool = False
    """Say nothing but errors and what was written."""
    verbose: bool = False
    """Say more."""


def run(words: Sequence[str]) -> list[Path]:
    """Draw and write; returns what was written."""
    options = parse(CompareOptions, words, "diffusion-grpo compare")
    check_counts(options, "num_prompts", "num_images", "font_size", "batch_size")
    if options.strip is not None or options.animation is not None:
        return _time_lapse(options)
    return _side_by_side(options)


def _time_lapse(options: CompareOptions) -> list[Path]:
    if len(options.models) != 1:
        raise UsageError("--strip and --animation show one run: give one run directory")
    if not (Path(options.models[0]) / "config.yaml").is_file():
        raise UsageError(
            f"{options.models[0]!r} holds no run; expected what --run.output of `train` named"
        )
    gallery, written = Gallery(options.models[0]), []
    for path in (options.strip, options.animation):
        if path is not None:
            check_image_path(path)
    if options.strip is not None:
        strip = time_lapse_strip(gallery, prompts=options.num_prompts, text_size=options.font_size)
        save_image(options.strip, strip, {"run": options.models[0]})
        written.append(options.strip)
    if options.animation is not None:
        frames = time_lapse_frames(
            gallery, prompts=options.num_prompts, text_size=options.font_size
        )
        save_animation(options.animation, frames, seconds=0.6)
        written.append(options.animation)
    return written


def _side_by_side(options: CompareOptions) -> list[Path]:
    words = list(options.models)
    if len(words) == 1 and (Path(words[0]) / "config.yaml").is_file():
        words = [f"{words[0]}@base", words[0]]
    if not 2 <= len(words) <= 4:
        raise UsageError(f"{len(words)} models; expected two to four, or one run directory")
    check_sampler(options.sampler, options.eta)
    check_dtype(options.dtype)
    if options.output is None:
        raise UsageError("nothing to write: give --output, --strip or --animation")
    check_image_path(options.output)
    source = options.prompts
    if not options.prompt and source is None:
        source = _own_list(words)
    prompts = read_prompts(options.prompt, source, options.num_prompts)
    paths = [find_model(word) for word in words]
    labels = [_label(word, path) for word, path in zip(words, paths, strict=True)]

    from diffusion_grpo.pipeline import generate
    from diffusion_grpo.pretrained import DTYPES, StableDiffusion
    from diffusion_grpo.reward import RewardSet, parse_reward_specs

    talk = Talk(options.quiet, options.verbose)
    rewards = (
        RewardSet.load(
            parse_reward_specs(
                options.reward, reward_options(words, options.reward, options.reward_options)
            )
        )
        if options.reward
        else None
    )
    n = options.num_images
    repeated = [prompt for prompt in prompts for _ in range(n)]
    texts = [prompt.text for prompt in repeated]
    metadata = [prompt.metadata for prompt in repeated]
    if rewards is not None:
        rewards.check(texts, metadata, group_size=n, what="num_images")
    images: list[np.ndarray] = []
    settings: dict[str, Any] = {}
    for name, path in zip(labels, paths, strict=True):
        dtype = DTYPES[options.dtype]
        model = StableDiffusion.from_pretrained(path, dtype=dtype, param_dtype=dtype)
        if not settings:
            own = model.sampling or SamplingDefaults()
            settings = {
                "num_steps": options.num_steps or own.num_steps,
                "guidance_scale": own.guidance_scale
                if options.guidance_scale is None
                else options.guidance_scale,
                "sampler": options.sampler,
                "eta": options.eta,
                "negative_prompt": options.negative_prompt,
                "clip_skip": own.clip_skip,
                "seed": options.seed,
            }
        with talk.progress(name, len(texts)) as count:
            images.append(
                generate(
                    model,
                    texts,
                    **settings,
                    prompt_index=[i for i in range(len(prompts)) for _ in range(n)],
                    image_index=[j for _ in prompts for j in range(n)],
                    batch_size=options.batch_size,
                    on_images=count,
                )
            )
    scores = None
    if rewards is not None:
        scores = [rewards(drawn, texts, metadata, group_size=n).total for drawn in images]
        means = [f"{k} {np.mean(v):.4f}" for k, v in zip(labels, scores, strict=True)]
        talk.say("mean reward: " + ", ".join(means))
    page = comparison_grid(images, labels, texts, scores=scores, text_size=options.font_size)
    save_image(options.output, page, {"models": words, "rewards": list(options.reward)} | settings)
    return [options.output]


def _own_list(words: Sequence[str]) -> str:
    """Return the held-out list of the first run among the models.

    Raises:
        UsageError: none of them is a run.
    """
    import yaml

    for word in words:
        config = Path(word.rpartition("@")[0] or word) / "config.yaml"
        if config.is_file():
            lists = yaml.safe_load(config.read_text(encoding="utf-8"))["prompts"]
            return lists["heldout"] or lists["train"]
    raise UsageError("give the prompts by --prompt TEXT ..., or by --prompts NAME|FILE")


def _label(word: str, path: str) -> str:
    """Return a model's short name, with what is after the @ of RUN@WHICH."""
    run, at, which = word.rpartition("@")
    return f"{label(run)}@{which}" if at else label(path)
