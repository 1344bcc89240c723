"""The command line: `diffusion-grpo COMMAND`.

What a user can mend before work starts exits with 2; what stops a run later (a reward, a full disk,
memory, numbers that are not finite) exits with 1. A run that SIGTERM stopped has saved everything
and exits with 75, Ctrl-C with 130.
"""

from __future__ import annotations

import functools
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from diffusion_grpo import __version__
from diffusion_grpo.errors import (
    PREEMPTED_EXIT_CODE,
    Preempted,
    RewardError,
    RunError,
    UsageError,
    suggest,
)
from diffusion_grpo.output_files import NO_ROOM
from diffusion_grpo.refusals import refusals

if TYPE_CHECKING:
    from diffusion_grpo.config import Config

_T = TypeVar("_T")

USAGE = """usage: diffusion-grpo COMMAND [options]

RL fine-tuning of text-to-image diffusion models in JAX.

  train [PRESET | config.yaml] [--section.field value ...]
                     fine-tune a checkpoint against rewards; --help lists every field
  train --resume RUN [--iterations N]
                     go on with a run that was interrupted, or make it longer
                     both: --quiet shows no progress, --verbose every iteration;
                     --distributed as one of several processes, which SLURM, Kubernetes or a
                     TPU pod started, or --distributed.coordinator-address HOST:PORT
                     --distributed.num-processes N --distributed.process-id I;
                     SIGTERM saves at the next microbatch, and exits with 75
  sample             draw images from a checkpoint into a grid
  compare            models side by side, or a run as a time-lapse
  evaluate           rewards on held-out prompts, with intervals, against a base
  export RUN         a run's model for Diffusers: pipeline, UNet or LoRA file
  report RUN ...     runs as one HTML page
  view RUN ...       the same page, live while a run trains
  plan [PRESET | config.yaml]
                     will a run fit, and how fast, on devices that need not be here
  bench [PRESET]     how fast a run goes on this machine, alone or against PyTorch
  score              score images that are there already
  check-reward       find out whether a reward keeps the contract
  serve-reward       compute a reward for runs elsewhere
  doctor             what this machine has, and what is wrong with it
  list rewards | prompts | metrics | presets | checkpoints
                     what comes with the project

diffusion-grpo COMMAND --help says more. """


# Commands in modules of their own, under `commands/`; each returns the files that it wrote.
MODULES = ("sample", "compare", "evaluate", "export", "report", "view", "bench", "plan", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "list": _list}
    commands |= {name: functools.partial(_module, name) for name in MODULES}
    commands |= {
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
    except (UsageError, RewardError, RunError, Preempted) as error:
        print(f"diffusion-grpo: {error}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        place = f"{error.filename} could not be written: " if error.filename else ""
        print(
            f"diffusion-grpo: {place}{error.strerror}; make room on the disk, or write elsewhere",
            file=sys.stderr,
        )
        return exit_code(error)
    except KeyboardInterrupt as error:
        if str(error):  # of a run: what goes on with it
            print(f"diffusion-grpo: {error}", file=sys.stderr)
        return exit_code(error)


def exit_code(error: BaseException) -> int:
    """Return what an error means to the shell."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, Preempted):
        return PREEMPTED_EXIT_CODE
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _train(words: list[str]) -> int:
    from diffusion_grpo.distributed import split_launch, together

    launch, words = split_launch(words)
    _prepare_jax()
    with together(launch, exit_code):
        _run(words)
    return 0


def _run(words: list[str]) -> None:
    from diffusion_grpo.config import load_config
    from diffusion_grpo.run_models import with_found_model

    loudness = {name: f"--{name}" in words for name in ("quiet", "verbose")}
    if all(loudness.values()):
        raise UsageError("--quiet and --verbose are opposites: give one of them")
    words = [word for word in words if word not in ("--quiet", "--verbose")]
    command = ["diffusion-grpo", "train", *words]
    if words and words[0] == "--resume":
        config, resume = _resumed(words[1:]), True
    else:
        start = words.pop(0) if words and not words[0].startswith("-") else None
        config, resume = with_found_model(load_config(start, words)), False
    from diffusion_grpo.interrupt import preemptible
    from diffusion_grpo.processes import leads

    def again() -> str:
        begun = (Path(config.run.output) / "config.yaml").is_file()
        return shlex.join(
            [*command[:2], "--resume", config.run.output] if begun and not resume else command
        )

    with preemptible(again):
        from diffusion_grpo.train import train

        result = train(config, resume=resume, **loudness)
    if not leads():
        return
    print(f"run directory: {result.directory}")
    print(f"  before and after: {result.directory / 'samples' / 'before_after.png'}")
    print(f"  fine-tuned model: {result.directory / 'final'}")
    if config.run.report:
        print(f"  report: {result.directory / 'report.html'}")


def _resumed(words: list[str]) -> Config:
    """Return the configuration of a run that is gone on with, perhaps for more iterations."""
    from diffusion_grpo.config import load_config

    longer = len(words) == 3 and words[1] in ("--iterations", "--run.iterations")
    if len(words) != 1 and not longer:
        raise UsageError(
            "train --resume takes one run directory, and no other option but --iterations N, to "
            "make the run longer, and --distributed: a run keeps its config"
        )
    path = str(Path(words[0]) / "config.yaml")
    config = load_config(path, ["--run.output", *words])
    before = load_config(path).run.iterations
    if config.run.iterations < before:
        raise UsageError(
            f"--iterations is {config.run.iterations}, and {words[0]} is a run of {before}; "
            "expected more: a run can be made longer, not shorter"
        )
    return config


def _module(name: str, words: list[str]) -> int:
    _prepare_jax()
    for path in importlib.import_module(f"diffusion_grpo.commands.{name}").run(words):
        print(path)
    return 0


def _list(words: list[str]) -> int:
    kinds = ("rewards", "prompts", "metrics", "presets", "checkpoints")
    if len(words) != 1 or words[0] not in kinds:
        near = suggest(words[0], kinds) if words else ""
        raise UsageError(f"list takes one of {', '.join(kinds)}{near}")
    if words[0] == "rewards":
        from diffusion_grpo.reward_loading import list_rewards

        rows = list_rewards()
    elif words[0] == "prompts":
        from diffusion_grpo.prompts import describe_prompts, list_prompts

        rows = {name: describe_prompts(name) for name in list_prompts()}
    elif words[0] == "metrics":
        from diffusion_grpo.metrics import metric_meanings

        rows = metric_meanings()
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
    with refusals():
        return tyro.cli(kind, args=words, prog=prog)


def _prepare_jax() -> None:
    """Set what JAX and Transformers read from the environment as they are imported.

    Compiled programs are kept in the user's cache folder, the hundreds of small ones too, which are
    a quarter of a second start. Transformers does not tell that PyTorch is missing: nothing here
    wants it. Of a GPU's memory JAX may have the share that `plan` counts on; its own default is
    three quarters.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # plan.USABLE
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "diffusion-grpo" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
