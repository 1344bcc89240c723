"""The command line: `diffusion-grpo train | sample | list`.

What a user can mend before work starts exits with 2; a reward that fails later exits with 1.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from diffusion_grpo import __version__
from diffusion_grpo.errors import RewardError, UsageError, suggest

_T = TypeVar("_T")

USAGE = """usage: diffusion-grpo COMMAND [options]

RL fine-tuning of text-to-image diffusion models in JAX.

  train [PRESET | config.yaml] [--section.field value ...]
                     fine-tune a checkpoint against rewards; --help lists every field
  train --resume RUN go on with a run that was interrupted
  sample             draw images from a checkpoint into a grid
  score              score images that are there already
  check-reward       find out whether a reward keeps the contract
  serve-reward       compute a reward for runs elsewhere
  list rewards | prompts | presets | checkpoints
                     what comes with the project

diffusion-grpo COMMAND --help says more. """


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Draw images from a checkpoint into a grid: rows are prompts, columns are images."""

    prompt: tuple[str, ...]
    """Prompts, or one prompt file given as @FILE."""
    model: str = "shapes-diffusion"
    """Checkpoint in the Diffusers layout: a directory, an embedded name, or a hub id."""
    output: Path = Path("grid.png")
    """The PNG to write."""
    num_images: int = 4
    """Images of each prompt."""
    seed: int = 0
    """Seed of the noise; image n of a prompt is the same whatever else is drawn."""
    num_steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """T, denoising steps; the default is what the checkpoint says, or 50 if it says nothing."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """s, classifier-free guidance; the default is what the checkpoint says, or 5."""
    eta: float = 0.0
    """η of DDIM; 0 is deterministic."""
    negative_prompt: str = ""
    """Text of the unconditional half of the guidance."""
    height: int | None = None
    """In pixels; None takes the checkpoint's."""
    width: int | None = None
    """In pixels; None takes the checkpoint's."""
    batch_size: int = 16
    """Images drawn at a time."""
    dtype: str = "float32"
    """Compute dtype: float32 or bfloat16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "sample": _sample,
        "list": _list,
        "score": _score,
        "check-reward": _check_reward,
        "serve-reward": _serve_reward,
    }
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(USAGE)
            return 0
        if words[0] == "--version":
            print(f"diffusion-grpo {__version__}")
            return 0
        if words[0] not in commands:
            raise UsageError(
                f"unknown command {words[0]!r}{suggest(words[0], commands)}; expected "
                f"{', '.join(commands)}"
            )
        return commands[words[0]](words[1:])
    except UsageError as error:
        print(f"diffusion-grpo: {error}", file=sys.stderr)
        return 2
    except RewardError as error:
        print(f"diffusion-grpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _train(words: list[str]) -> int:
    from diffusion_grpo.config import load_config

    if words and words[0] == "--resume":
        if len(words) != 2:
            raise UsageError(
                "train --resume takes one run directory and no other option: a run keeps its config"
            )
        config = load_config(str(Path(words[1]) / "config.yaml"), ["--run.output", words[1]])
        resume = True
    else:
        start = words.pop(0) if words and not words[0].startswith("-") else None
        config, resume = load_config(start, words), False
    _prepare_jax()
    from diffusion_grpo.train import train

    result = train(config, resume=resume)
    print(f"run directory: {result.directory}")
    print(f"  before and after: {result.directory / 'samples' / 'before_after.png'}")
    print(f"  fine-tuned model: {result.directory / 'final'}")
    return 0


def _sample(words: list[str]) -> int:
    options = _parse(SampleOptions, words, "diffusion-grpo sample")
    from diffusion_grpo.images import check_image_path, image_grid, save_image
    from diffusion_grpo.prompts import load_prompts
    from diffusion_grpo.sampling import SamplingDefaults

    if options.num_images < 1 or options.batch_size < 1:
        raise UsageError("num_images and batch_size must be 1 or more")
    prompts = [
        text
        for given in options.prompt
        for text in (
            [p.text for p in load_prompts(given[1:])] if given.startswith("@") else [given]
        )
    ]
    if options.dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype is {options.dtype!r}; expected float32 or bfloat16")
    path = check_image_path(options.output)
    settings = {"guidance_scale": options.guidance_scale, "num_steps": options.num_steps}
    given = {name: value for name, value in settings.items() if value is not None}
    SamplingDefaults(**given)  # refuses what is out of bounds before a model is read
    _prepare_jax()
    from diffusion_grpo.pipeline import generate
    from diffusion_grpo.pretrained import DTYPES, StableDiffusion

    dtype = DTYPES[options.dtype]
    model = StableDiffusion.from_pretrained(options.model, dtype=dtype, param_dtype=dtype)
    sampling = dataclasses.replace(model.sampling or SamplingDefaults(), **given)
    print(
        f"guidance scale {sampling.guidance_scale:g}, {sampling.num_steps} steps", file=sys.stderr
    )
    n = options.num_images
    total = n * len(prompts)
    images = generate(
        model,
        [text for text in prompts for _ in range(n)],
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        eta=options.eta,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        prompt_index=[i for i in range(len(prompts)) for _ in range(n)],
        image_index=[j for _ in prompts for j in range(n)],
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
        on_images=lambda done: print(f"{done}/{total} images", file=sys.stderr),
    )
    grid = image_grid(images, prompts, columns=n)
    save_image(
        path,
        grid,
        {
            "prompt": "\n".join(prompts),
            "model": options.model,
            "seed": options.seed,
            "num_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "eta": options.eta,
        },
    )
    print(path)
    return 0


def _list(words: list[str]) -> int:
    kinds = ("rewards", "prompts", "presets", "checkpoints")
    if len(words) != 1 or words[0] not in kinds:
        near = suggest(words[0], kinds) if words else ""
        raise UsageError(f"list takes one of {', '.join(kinds)}{near}")
    if words[0] == "rewards":
        from diffusion_grpo.reward_loading import list_rewards

        rows = list_rewards()
    elif words[0] == "prompts":
        from diffusion_grpo.prompts import describe_prompts, list_prompts

        rows = {name: describe_prompts(name) for name in list_prompts()}
    elif words[0] == "presets":
        from diffusion_grpo.config import PRESETS, describe_preset

        rows = {name: describe_preset(name) for name in PRESETS}
    else:
        from diffusion_grpo.resources import embedded_checkpoints

        rows = dict.fromkeys(embedded_checkpoints(), "")
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _score(words: list[str]) -> int:
    from diffusion_grpo.reward_commands import ScoreOptions, score

    options = _parse(ScoreOptions, words, "diffusion-grpo score")
    _prepare_jax()
    return score(options)


def _check_reward(words: list[str]) -> int:
    from diffusion_grpo.reward_commands import CheckOptions, check

    options = _parse(CheckOptions, words, "diffusion-grpo check-reward")
    _prepare_jax()
    return check(options)


def _serve_reward(words: list[str]) -> int:
    from diffusion_grpo.reward_commands import ServeOptions, serve

    options = _parse(ServeOptions, words, "diffusion-grpo serve-reward")
    _prepare_jax()
    return serve(options)


def _parse(kind: type[_T], words: list[str], prog: str) -> _T:
    """Parse options with tyro; what it refuses is a `UsageError`."""
    import contextlib
    import io

    from diffusion_grpo.config import plain_text

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=words, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(plain_text(complaint.getvalue())) from None


def _prepare_jax() -> None:
    """Set what JAX and Transformers read from the environment as they are imported.

    Compiled programs are kept in the user's cache folder, so that a second start is quick, and
    Transformers does not tell that PyTorch is missing: nothing here wants it.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "diffusion-grpo" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
