"""`diffusion-grpo sample`: draw images from a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from diffusion_grpo.commands.common import Talk, check_counts, check_dtype, parse, read_prompts
from diffusion_grpo.errors import UsageError
from diffusion_grpo.grids import TEXT_SIZE, image_grid
from diffusion_grpo.images import (
    check_image_path,
    check_image_size,
    save_animation,
    save_image,
    to_image,
)
from diffusion_grpo.run_models import find_models
from diffusion_grpo.sampling import SamplingDefaults, check_sampler


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Draw images from a checkpoint into a grid: rows are prompts, columns are images."""

    prompt: tuple[str, ...] = ()
    """Prompts; @FILE stands for the prompts of a file."""
    prompts: str | None = None
    """A prompt list instead: a name, a file, or a template such as "a {color} {animal}"."""
    num_prompts: int | None = None
    """Only so many of the prompts, from the first."""
    model: str = "shapes-diffusion"
    """Checkpoint in the Diffusers layout: a directory, an embedded name, or a hub id; or a run."""
    lora: tuple[str, ...] = ()
    """LoRA files or folders of Diffusers, PEFT or kohya, FILE[=WEIGHT] each; several add up."""
    output: Path | None = Path("grid.png")
    """The grid to write: .png, .webp or .jpg; None writes no grid."""
    singles: Path | None = None
    """A folder for every image as a PNG of its own, with its prompt and settings inside."""
    animate: Path | None = None
    """A .webp that shows the denoising: what the model predicts at each step."""
    num_images: int = 4
    """Images of each prompt."""
    seed: int = 0
    """Seed of the noise; image n of the prompt at a place in the list is the same whatever else is
    drawn."""
    sampler: str = "ddim"
    """ddim, ddpm, dpm++ (DPM-Solver++ 2M) or euler."""
    num_steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """T, denoising steps; the default is what the checkpoint says, or 50 if it says nothing."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """s, classifier-free guidance; the default is what the checkpoint says, or 5."""
    eta: float = 0.0
    """η of the sampler ddim; 0 is deterministic."""
    negative_prompt: str | None = None
    """Text of the unconditional half of the guidance; the default is what the checkpoint says, or
    none."""
    clip_skip: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Layers of the text encoders to skip; the default is what the checkpoint says, or 0."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16; without it, RUN@base has the run's."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; without it, RUN@base has the run's."""
    height: int | None = None
    """In pixels; the default is what a trained checkpoint says, or its own."""
    width: int | None = None
    """In pixels; the default is what a trained checkpoint says, or its own."""
    columns: int | None = None
    """Images a row of the grid; None makes a row of each prompt."""
    cell_size: int | None = None
    """Longest side of an image in the grid, in pixels; None shows it in full."""
    font_size: int = TEXT_SIZE
    """Of the captions, in pixels; 0 draws none."""
    batch_size: int = 16
    """Images drawn at a time."""
    dtype: str = "float32"
    """Compute dtype: float32 or bfloat16."""
    quiet: bool = False
    """Say nothing but errors and what was written."""
    verbose: bool = False
    """Say more."""

    def check(self) -> None:
        """Refuse what no model is needed to refuse.

        Raises:
            UsageError: an option that is out of bounds.
        """
        check_counts(self, "num_images", "batch_size", "num_prompts", "columns", "cell_size")
        if self.font_size < 0:
            raise UsageError(f"font_size is {self.font_size}; expected 0 or more")
        check_sampler(self.sampler, self.eta)
        check_dtype(self.dtype)
        if not (self.output or self.singles or self.animate):
            raise UsageError("nothing to write: give --output, --singles or --animate")
        for path in (self.output, self.animate):
            if path is not None:
                check_image_path(path)
        if self.animate is not None and self.animate.suffix.lower() != ".webp":
            raise UsageError(
                f"animate is {str(self.animate)!r}; expected a name that ends in .webp"
            )
        if self.singles is not None:
            place = self.singles.expanduser().absolute()
            above = next(folder for folder in (place, *place.parents) if folder.exists())
            if not above.is_dir():
                raise UsageError(f"singles is {str(self.singles)!r}: {above} is no folder")
            if not os.access(above, os.W_OK):
                raise UsageError(f"singles is {str(self.singles)!r}: {above} cannot be written")


def _adapter(word: str) -> tuple[Path, float]:
    """Return the file of `FILE[=WEIGHT]` and the weight."""
    name, equals, text = word.rpartition("=")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        raise UsageError(f"lora is {word!r}; expected FILE or FILE=WEIGHT, a number") from None
    if not math.isfinite(weight):
        raise UsageError(f"lora is {word!r}: the weight is not finite; expected a number")
    path = Path(name if equals else word).expanduser()
    if not path.exists():
        raise UsageError(
            f"lora {str(path)!r} does not exist; expected a file or a folder of an adapter"
        )
    return path, weight


def run(words: Sequence[str]) -> list[Path]:
    """Draw and write; returns what was written."""
    options = parse(SampleOptions, words, "diffusion-grpo sample")
    options.check()
    talk = Talk(options.quiet, options.verbose)
    prompts = [p.text for p in read_prompts(options.prompt, options.prompts, options.num_prompts)]
    names = ("guidance_scale", "num_steps", "clip_skip", "negative_prompt", "height", "width")
    settings = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in settings.items() if value is not None}
    SamplingDefaults(**given)  # refuses what is out of bounds before a model is read
    adapters = [_adapter(word) for word in options.lora]
    (source,) = find_models([options.model], revision=options.revision, variant=options.variant)

    from diffusion_grpo.lora_files import load_lora
    from diffusion_grpo.pipeline import generate, latent_shape
    from diffusion_grpo.pretrained import DTYPES, StableDiffusion

    dtype = DTYPES[options.dtype]
    model = StableDiffusion.from_pretrained(
        source.place,
        dtype=dtype,
        param_dtype=dtype,
        variant=source.variant,
        revision=source.revision,
    )
    sampling = dataclasses.replace(model.sampling or SamplingDefaults(), **given)
    factor = model.vae.config.downscale_factor
    height, width = (factor * n for n in latent_shape(model, sampling.height, sampling.width)[:2])
    _check_sizes(options, prompts, height, width)
    for number, (file, weight) in enumerate(adapters):
        load_lora(model, file, name=f"lora_{number}", weight=weight)
    talk.say(
        f"guidance scale {sampling.guidance_scale:g}, {sampling.num_steps} steps of "
        f"{options.sampler}"
    )
    n = options.num_images
    previews: list[np.ndarray] = []
    with talk.progress("images", n * len(prompts)) as count:
        images = generate(
            model,
            [text for text in prompts for _ in range(n)],
            **sampling.settings(),
            sampler=options.sampler,
            eta=options.eta,
            seed=options.seed,
            prompt_index=[i for i in range(len(prompts)) for _ in range(n)],
            image_index=[j for _ in prompts for j in range(n)],
            batch_size=options.batch_size,
            on_images=count,
            on_previews=previews.append if options.animate else None,
        )
    made = {
        "model": options.model,
        "lora": " ".join(options.lora),
        "seed": options.seed,
        "num_steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "sampler": options.sampler,
        "eta": options.eta,
        "negative_prompt": sampling.negative_prompt,
        "clip_skip": sampling.clip_skip,
        "revision": source.revision or "",
        "variant": source.variant or "",
        "dtype": options.dtype,
    }
    written = []
    if options.output is not None:
        grid = _grid(options, images, prompts)
        save_image(options.output, grid, {"prompt": "\n".join(prompts)} | made)
        written.append(options.output)
    if options.singles is not None:
        written += _write_singles(options.singles.expanduser(), images, prompts, n, made)
    if options.animate is not None:
        steps = np.concatenate(previews, axis=1)
        frames = [_grid(options, step, prompts) for step in (*steps, images)]
        save_animation(options.animate, frames)
        written.append(options.animate)
    return written


def _grid(options: SampleOptions, images: np.ndarray, prompts: Sequence[str]) -> Any:
    columns = options.columns or options.num_images
    per_image = columns != options.num_images
    captions = [t for t in prompts for _ in range(options.num_images)] if per_image else prompts
    return image_grid(
        images,
        captions if options.font_size else None,
        columns=columns,
        max_size=options.cell_size,
        text_size=options.font_size or TEXT_SIZE,
    )


def _check_sizes(options: SampleOptions, prompts: Sequence[str], height: int, width: int) -> None:
    """Refuse a grid of images of a size that is larger than its files hold."""
    paths = [
        (path, animated)
        for path, animated in ((options.output, False), (options.animate, True))
        if path is not None and path.suffix.lower() != ".png"
    ]
    if paths:
        count = len(prompts) * options.num_images
        blank = np.broadcast_to(np.uint8(255), (count, height, width, 3))
        size = _grid(options, blank, prompts).size
        for path, animated in paths:
            mend = "show smaller images with --cell-size, or lay them out otherwise with --columns"
            check_image_size(path, size, animated=animated, mend=mend)


def _write_singles(
    folder: Path, images: np.ndarray, prompts: Sequence[str], each: int, made: dict[str, Any]
) -> list[Path]:
    """Write every image as a PNG with its own prompt, and the two numbers its noise is drawn by."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for place, image in enumerate(images):
        text = prompts[place // each]
        words = re.sub(r"[^\w]+", "_", text).strip("_")[:60]
        path = folder / f"{place // each:04d}_{place % each:03d}_{words}.png"
        number = {"prompt_number": place // each, "image": place % each}
        save_image(path, to_image(image), {"prompt": text} | made | number)
        written.append(path)
    return written
