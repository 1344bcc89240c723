"""Which checkpoint a word on the command line means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from diffusion_grpo.errors import UsageError


def find_model(word: str) -> str:
    """Return the checkpoint that a word means: a checkpoint, or a model of a run.

    Args:
        word: a directory, an embedded name or a hub id; or a run directory, which stands for its
            trained model, `RUN@best` for its best one, and `RUN@base` for what it started from.

    Raises:
        UsageError: the run does not have that model.
    """
    name, at, which = word.rpartition("@")
    run = Path(name if at else word).expanduser()
    if not (run / "config.yaml").is_file():
        return word
    which = which if at else "final"
    if which == "base":
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return str(values["model"]["pretrained"])
    if which not in ("final", "best"):
        raise UsageError(
            f"{word!r}: a run has the models final, best and base; expected one of them, or a "
            f"folder that `diffusion-grpo export {run}@N --output FOLDER` wrote"
        )
    # The best model is kept apart only while it is not the last.
    found = run / which
    if which == "best" and not found.is_dir() and (run / "best.json").is_file():
        found = run / "final"
    if not found.is_dir():
        if which == "best":
            raise UsageError(
                f"{word!r}: the run has no best/; expected a run with --eval.every, which keeps one"
            )
        raise UsageError(
            f"{word!r}: the run has no final/; wait for its end, or end it with `diffusion-grpo "
            f"train --resume {run}`, or take a checkpoint of it with `diffusion-grpo export "
            f"{run}@N --output FOLDER`{_at(run)}"
        )
    return str(found)


def _at(run: Path) -> str:
    """Say after how many iterations a run has checkpoints."""
    folder = run / "checkpoints"
    steps = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = sorted(int(step) for step in steps if step.isdecimal())
    return f" (N: {', '.join(map(str, numbers))})" if numbers else ""


def reward_options(
    words: Sequence[str], rewards: Sequence[str], given: Sequence[str]
) -> tuple[str, ...]:
    """Return the options of rewards: those given, and otherwise those of the first run.

    A run's `clip` is then scored with the CLIP model that the run was trained on.

    Args:
        words: models as given on the command line; runs among them.
        rewards: in the form of `train --reward`.
        given: `NAME.OPTION=VALUE` each; they come before the run's.

    Raises:
        UsageError: a reward is malformed.
    """
    from diffusion_grpo.reward_specs import parse_reward_specs

    names = {spec.name for spec in parse_reward_specs(rewards)}
    taken = {option.partition("=")[0] for option in given}
    for word in words:
        config = Path(word.rpartition("@")[0] or word).expanduser() / "config.yaml"
        if not config.is_file():
            continue
        options = yaml.safe_load(config.read_text(encoding="utf-8"))["reward"]["options"]
        keys = [option.partition("=")[0] for option in options]
        own = [
            option
            for key, option in zip(keys, options, strict=True)
            if key.rpartition(".")[0] in names and key not in taken
        ]
        return (*given, *own)
    return tuple(given)


def label(word: str) -> str:
    """Return a short name of a model for people: a run's name, or the last part of a path."""
    path = Path(word)
    return path.parent.name if path.name in ("final", "best") and path.parent.name else path.name
