"""Which checkpoint a word on the command line means."""

from __future__ import annotations

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
            f"{word!r}: a run has the models final, best and base; export another checkpoint first"
        )
    # The best model is kept apart only while it is not the last.
    found = run / which
    if which == "best" and not found.is_dir() and (run / "best.json").is_file():
        found = run / "final"
    if not found.is_dir():
        raise UsageError(f"{word!r}: the run has no {which}/ yet; wait until it is written")
    return str(found)


def label(word: str) -> str:
    """Return a short name of a model for people: a run's name, or the last part of a path."""
    path = Path(word)
    return path.parent.name if path.name in ("final", "best") and path.parent.name else path.name
