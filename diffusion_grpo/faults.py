"""What can go wrong around a run, and what to tell the user of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from diffusion_grpo.checkpoint import Checkpoints, short
from diffusion_grpo.errors import RunError
from diffusion_grpo.output_files import NO_ROOM

# Phase → which options lower the memory that it takes, the cheapest first.
LOWER = {
    "loading the model": "model.dtype to 'bfloat16', or raise mesh.fsdp with more devices",
    "restoring the checkpoint": (
        "what other programs hold of that memory, or raise mesh.fsdp in the run's config.yaml with "
        "more devices"
    ),
    "evaluation": "rollout.microbatch, which is how many images are drawn at a time",
    "sampling": "rollout.microbatch, or rollout.height and rollout.width",
    "the update": (
        "grpo.microbatch, set model.gradient_checkpointing, or train a LoRA adapter "
        "(model.trainable 'lora')"
    ),
}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Say which option to lower if the device's memory runs out within.

    Args:
        name: one of `LOWER`.

    Raises:
        RunError: it did.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"out of device memory in {name}: {short(error)}. Lower {LOWER[name]}"
        ) from error


@contextlib.contextmanager
def explained(directory: Path, checkpoints: Checkpoints, resume: str) -> Iterator[None]:
    """Turn what a file system does to a run into a message, with the last good checkpoint.

    Args:
        directory: of the run.
        checkpoints: the run's.
        resume: the command that goes on with it.

    Raises:
        RunError: a file could not be written, or device memory ran out.
    """
    try:
        yield
    except OSError as error:
        if not present(directory):
            raise RunError(removed(directory)) from error
        place = error.filename or directory
        what = error.strerror or str(error)
        mend = "check that it can be written"
        if error.errno in NO_ROOM:
            mend = "make room on the disk"
        raise RunError(
            f"{place} could not be written: {what}; {last_good(checkpoints)}; {mend}, then go on "
            f"with: {resume}"
        ) from error
    except RunError as error:
        if not present(directory):
            raise RunError(removed(directory)) from error
        raise RunError(f"{error}\n{last_good(checkpoints)}; go on with: {resume}") from error


def last_good(checkpoints: Checkpoints) -> str:
    """Return where the last good checkpoint is."""
    checkpoints.settle()
    latest = checkpoints.latest
    if latest is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {checkpoints.path(latest)}"


def removed(directory: Path) -> str:
    """Return what to say of a run whose directory is gone."""
    return (
        f"run directory {directory} was removed while the run was writing to it, and with it its "
        "checkpoints; nothing more is written there. Put it back and resume it, or start anew"
    )


def present(directory: Path) -> bool:
    """Whether the run is there; a save on its way may have made the bare folder again."""
    return (directory / "config.yaml").is_file()


def check_present(directory: Path) -> None:
    """Raise a `RunError` if the run directory is gone, which an open file would not notice."""
    if not present(directory):
        raise RunError(removed(directory))


def nonfinite_message(in_a_row: int, limit: int) -> str:
    """Return why a run stopped whose updates were skipped."""
    return (
        f"{in_a_row} updates in a row were skipped because their loss or gradient was not finite, "
        f"more than run.max_nonfinite = {limit}: the parameters are those before the first of "
        "them. Lower optim.learning_rate, set model.dtype = 'float32', or look at the rewards"
    )
