"""`diffusion-grpo compare`: models side by side, and a run as a time-lapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from diffusion_grpo.commands.common import Talk, check_counts, check_dtype, parse, read_prompts
from diffusion_grpo.comparison import comparison_grid, time_lapse_frames, time_lapse_strip
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Gallery
from diffusion_grpo.grids import TEXT_SIZE
from diffusion_grpo.images import (
    check_animation_path,
    check_image_path,
    check_image_size,
    save_animation,
    save_image,
)
from diffusion_grpo.report import different_names
from diffusion_grpo.run_models import find_models, reward_options, run_model, run_prompts
from diffusion_grpo.sampling import SamplingDefaults, check_sampler, read_sampling

# What has a say in a time-lapse.
TIME_LAPSE = ("models", "strip", "animation", "num_prompts", "font_size", "quiet", "verbose")


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Draw two to four models at the same prompts and seeds, side by side.

    A run directory stands for the model it trained, RUN@best for its best and RUN@base for what it
    started from; a run alone is compared with its base. All are drawn alike: steps, guidance scale
    and clip skip are those that the last run's model says it was evaluated with
    (diffusion_grpo.json), or without a run, what the last checkpoint that has the file says; they
    are printed. With --strip or --animation, the pictures that a run recorded at its evaluations
    are shown over time, and no model is needed.
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
    """A prompt list instead; without any, what the first run held out of training: its held-out
    list, or its share of the training list (that list itself where nothing was held out)."""
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
    """T of all models; the default is what the last run's model says, or 50."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """s of all models; the default is what the last run's model says, or 5."""
    eta: float = 0.0
    """η of the sampler ddim."""
    negative_prompt: str | None = None
    """Text of the unconditional half of the guidance; the default is what that model says, or
    none."""
    variant: str | None = None
    """Variant of checkpoints' weight files, such as fp16; without it, RUN@base has the run's."""
    revision: str | None = None
    """Branch, tag or commit of hub repositories; without it, RUN@base has the run's."""
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
        _check_time_lapse(options, words)
        return _time_lapse(options)
    return _side_by_side(options)


def _check_time_lapse(options: CompareOptions, words: Sequence[str]) -> None:
    """Refuse what a time-lapse would ignore.

    Raises:
        UsageError: it is asked for.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    flags = [
        flag
        for field in dataclasses.fields(options)
        if field.name not in TIME_LAPSE
        and (flag := f"--{field.name.replace('_', '-')}") in given
        and not (field.name == "output" and options.output is None)
    ]
    if flags:
        raise UsageError(
            f"{', '.join(flags)} has no effect with --strip or --animation, which show the "
            "pictures that the run recorded; expected a `compare` of its own, without these two, "
            "to draw new ones"
        )


def _time_lapse(options: CompareOptions) -> list[Path]:
    if len(options.models) != 1:
        raise UsageError("--strip and --animation show one run: give one run directory")
    run = Path(options.models[0]).expanduser()
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"{options.models[0]!r} holds no run; expected what --run.output of `train` named"
        )
    gallery, written = Gallery(run), []
    if options.strip is not None:
        check_image_path(options.strip)
    if options.animation is not None:
        check_animation_path(options.animation)
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
    if len(words) == 1 and (Path(words[0]).expanduser() / "config.yaml").is_file():
        words = [f"{words[0]}@base", words[0]]
    if not 2 <= len(words) <= 4:
        raise UsageError(f"{len(words)} models; expected two to four, or one run directory")
    check_sampler(options.sampler, options.eta)
    check_dtype(options.dtype)
    if options.output is None:
        raise UsageError("nothing to write: give --output, --strip or --animation")
    check_image_path(options.output)
    names = ("num_steps", "guidance_scale", "negative_prompt")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    SamplingDefaults(**given)  # refuses what is out of bounds before a model is read
    if options.prompt or options.prompts is not None:
        prompts = read_prompts(options.prompt, options.prompts, options.num_prompts)
    elif (own := run_prompts(words)) is not None:
        prompts = list(own.prompts[: options.num_prompts])
    else:
        raise UsageError("give the prompts by --prompt TEXT ..., or by --prompts NAME|FILE")
    sources = find_models(words, revision=options.revision, variant=options.variant)
    labels = _labels(words, [source.place for source in sources])

    from diffusion_grpo.pipeline import generate
    from diffusion_grpo.pretrained import DTYPES, StableDiffusion, local_directory
    from diffusion_grpo.reward import RewardSet, parse_reward_specs

    talk = Talk(options.quiet, options.verbose)
    places = [
        local_directory(source.place, revision=source.revision, variant=source.variant)
        for source in sources
    ]
    number, said = _own_sampling(words, places)
    sampling = dataclasses.replace(said, **given)
    origin = "by default" if number is None else f"as {labels[number]} says"
    but = f" but for what is given ({', '.join(given)})" if given else ""
    talk.say(
        f"all models: guidance scale {sampling.guidance_scale:g}, {sampling.num_steps} steps of "
        f"{options.sampler}, clip skip {sampling.clip_skip}, {origin}{but}"
    )
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
    sizes: list[tuple[int, int]] = []
    settings: dict[str, Any] = sampling.settings() | {
        "sampler": options.sampler,
        "eta": options.eta,
        "seed": options.seed,
    }
    dtype = DTYPES[options.dtype]
    for name, place, source in zip(labels, places, sources, strict=True):
        model = StableDiffusion.from_pretrained(
            place, dtype=dtype, param_dtype=dtype, variant=source.variant
        )
        size = _size(model, sampling)
        if size not in sizes:
            _check_size(options, [*sizes, size], labels, texts, scored=rewards is not None)
        sizes.append(size)
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
    if len(set(sizes)) > 1:
        each = ", ".join(f"{k} {w} x {h}" for k, (h, w) in zip(labels, sizes, strict=True))
        talk.say(f"the models draw in different sizes ({each}); the smaller pictures are enlarged")
    scores = None
    if rewards is not None:
        scores = [rewards(drawn, texts, metadata, group_size=n).total for drawn in images]
        means = [f"{k} {np.mean(v):.4f}" for k, v in zip(labels, scores, strict=True)]
        talk.say("mean reward: " + ", ".join(means))
    page = comparison_grid(images, labels, texts, scores=scores, text_size=options.font_size)
    made = {
        "models": words,
        "rewards": list(options.reward),
        "settings_of": "" if number is None else words[number],
    }
    save_image(options.output, page, made | settings)
    return [options.output]


def _size(model: Any, sampling: SamplingDefaults) -> tuple[int, int]:
    """Return the height and width in pixels of what a model draws."""
    from diffusion_grpo.pipeline import latent_shape

    factor = model.vae.config.downscale_factor
    height, width, _ = latent_shape(model, sampling.height, sampling.width)
    return factor * height, factor * width


def _check_size(
    options: CompareOptions,
    sizes: Sequence[tuple[int, int]],
    labels: Sequence[str],
    texts: Sequence[str],
    *,
    scored: bool,
) -> None:
    """Refuse a page larger than its file holds, before a model draws anything.

    Args:
        options: the command's.
        sizes: heights and widths of the models that are known so far.
        labels: of all models.
        texts: one a picture.
        scored: whether scores stand below.
    """
    assert options.output is not None
    if options.output.suffix.lower() == ".png":
        return
    known = [*sizes, *[sizes[-1]] * (len(labels) - len(sizes))]
    blank = [np.broadcast_to(np.uint8(255), (len(texts), *size, 3)) for size in known]
    scores = [np.full(len(texts), 0.5)] * len(labels) if scored else None
    page = comparison_grid(blank, labels, texts, scores=scores, text_size=options.font_size)
    check_image_size(
        options.output, page.size, mend="compare fewer with --num-prompts and --num-images"
    )


def _own_sampling(
    words: Sequence[str], places: Sequence[Path]
) -> tuple[int | None, SamplingDefaults]:
    """Return what the models are drawn with where nothing else is asked for.

    A base says how it was made, a run's model how it was trained: the last one says it for all, and
    where no model is a run's, the last checkpoint.

    Args:
        words: models as given on the command line.
        places: their directories.

    Returns:
        The number of the model that says it, or None; and what it says, or the defaults.
    """
    trained = [found is not None and found.trained for found in map(run_model, words)]
    for number in sorted(range(len(words)), key=lambda i: (trained[i], i), reverse=True):
        own = read_sampling(places[number])
        if own is not None:
            return number, own
    return None, SamplingDefaults()


def _labels(words: Sequence[str], places: Sequence[str]) -> list[str]:
    """Return short names of the models, with what is after the @ of RUN@WHICH.

    Models of one name have as many of the folders above with it as tell them apart.
    """
    models = []
    for word, place in zip(words, places, strict=True):
        run, at, which = word.rpartition("@")
        path = Path(run if at else place).expanduser()
        if path.name in ("final", "best") and path.parent.name:
            path = path.parent
        models.append((path.resolve(), at + which if at else ""))
    paths = list(dict.fromkeys(path for path, _ in models))
    names = {path: path.name for path in paths}
    alike = [path for path in paths if list(names.values()).count(path.name) > 1]
    if alike:
        names |= zip(alike, different_names(alike), strict=True)
    return [names[path] + which for path, which in models]
