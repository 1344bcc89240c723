"""What a run prepares once: its directory, and the model with its adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffusion_grpo import processes
from diffusion_grpo.components import commit_of
from diffusion_grpo.config import Config, load_config, to_yaml
from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import write_whole
from diffusion_grpo.pipeline import LoRAOptions
from diffusion_grpo.pretrained import DTYPES, StableDiffusion
from diffusion_grpo.prompts import Prompt, fingerprint
from diffusion_grpo.reward import RewardSet
from diffusion_grpo.reward_record import RewardRecord, write_record
from diffusion_grpo.run_lock import LOCK_FILE, RunLock
from diffusion_grpo.text_encoding import ENCODERS

SCRATCH = "config.yaml.tmp"
PROMPTS_FILE = "prompts.json"  # which prompts the run began with

ListRecord = dict[str, Any]  # how many prompts a list has, and their fingerprint


@contextlib.contextmanager
def named_by(path: Path | None) -> Iterator[None]:
    """Say of what cannot be found or read within which file names it.

    Args:
        path: the configuration of a run that is gone on with, perhaps elsewhere; None for that of
            the command line, whose user knows.

    Raises:
        UsageError: what was raised within, with the file.
    """
    try:
        yield
    except UsageError as error:
        if path is None:
            raise
        raise UsageError(
            f"{error} (named by {path}, where what has moved is to be named anew)"
        ) from None


def check_directory(config: Config, resume: bool) -> Path:
    """Find out whether a run can be written to its directory, without leaving anything there.

    Raises:
        UsageError: it holds a run and this is no resume, or none and this is one; its run is
            finished, and its checkpoints are gone; it cannot be written.
    """
    directory = Path(config.run.output)
    held = (directory / "config.yaml").is_file()
    mend = "choose another with --run.output"
    if resume and not held:
        raise UsageError(f"{directory} holds no run to resume: config.yaml is not there")
    folder = directory / "checkpoints"
    saved = folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())
    ended = [name for name in ("evaluation.json", "final") if (directory / name).exists()]
    if resume and ended and not saved:
        raise UsageError(
            f"{directory} holds a finished run ({ended[0]}), but {folder} has no checkpoint to go "
            "on from; put it back, or begin another run with what this one trained: "
            f"`diffusion-grpo train --model {directory / 'final'}` and its options"
        )
    if not resume and held:
        raise UsageError(
            f"output directory {directory} holds another run; {mend}, or go on with it by "
            f"`diffusion-grpo train --resume {directory}`"
        )
    started = {LOCK_FILE, SCRATCH}  # what a run leaves that was killed before it had a config
    if not resume and directory.is_dir() and {p.name for p in directory.iterdir()} - started:
        raise UsageError(f"output directory {directory} holds other files; {mend}")
    parent = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"output directory {directory} cannot be written: {parent} refuses; {mend}"
        )
    return directory


def check_prompts(
    config: Config,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    rewards: RewardSet,
    gold: RewardSet | None,
) -> None:
    """Find out whether the rewards can judge what they will be asked to.

    Raises:
        UsageError: a reward cannot judge a prompt, or compares the images of one where there is
            only one; a gold reward is named like one that is trained on.
    """
    for name in gold.weight_of if gold is not None else ():
        if name in rewards.weight_of:
            raise UsageError(
                f"eval.gold has a reward that calls itself {name!r}, as one that is trained on "
                "does; expected different names: rename one"
            )
    evaluated = heldout[: config.eval.num_prompts]
    training = (prompts, config.rollout.images_per_prompt, "rollout.images_per_prompt")
    evaluation = (evaluated, config.eval.images_per_prompt, "eval.images_per_prompt")
    for judges, (chosen, group_size, what) in (
        (rewards, training),
        (rewards, evaluation),
        *([(gold, evaluation)] if gold is not None else []),
    ):
        # A long list of combinations is not made for those that judge any prompt.
        some = chosen if judges.checks_prompts else chosen[:0]
        texts, metadata = [p.text for p in some], [p.metadata for p in some]
        judges.check(texts, metadata, group_size=group_size, what=what)


def describe_lists(prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> dict[str, ListRecord]:
    """Return what tells a run's two lists of prompts from others, for JSON.

    Args:
        prompts: the training list.
        heldout: what is evaluated on.
    """
    return {
        name: {"prompts": len(side), "sha256": fingerprint(side)}
        for name, side in (("train", prompts), ("heldout", heldout))
    }


def check_lists(config: Config, lists: Mapping[str, ListRecord]) -> None:
    """Find out whether a run that is gone on with has the prompts that it began with.

    Args:
        config: the run's.
        lists: of `describe_lists`.

    Raises:
        UsageError: they have been edited meanwhile, or the record of them is damaged.
    """
    path = Path(config.run.output) / PROMPTS_FILE
    if not path.is_file():  # the run was killed before it was written
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: int(begun[name]["prompts"]) for name in lists}
        changed = [name for name, found in lists.items() if dict(begun[name]) != found]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} does not say which prompts the run began with; expected JSON, as `train` "
            "writes it: put it back, or delete it if the lists are what they were"
        ) from None
    for name in changed:
        own = name == "heldout" and config.prompts.heldout is not None
        field = "heldout" if own else "train"
        had, has = counts[name], lists[name]["prompts"]
        now = f"now {has}" if has != had else "now as many, but not the same"
        raise UsageError(
            f"prompts.{field} is {getattr(config.prompts, field)!r}, which has been edited since "
            f"the run began: then there were {had} prompts "
            f"{'to evaluate on' if name == 'heldout' else 'to train on'}, {now}; expected the same "
            "in the same order. Put the list back, or begin another run with what this one "
            f"trained: `diffusion-grpo export {config.run.output}@N --output FOLDER`, then "
            "`diffusion-grpo train --model FOLDER` and its options"
        )


def make_directory(
    config: Config,
    directory: Path,
    notes: Sequence[str] = (),
    *,
    lists: Mapping[str, ListRecord] | None = None,
    rewards: RewardRecord | None = None,
    resume: bool = False,
) -> RunLock:
    """Make the run directory with its `config.yaml`, if it is not there.

    Args:
        config: the run's.
        directory: of the run.
        notes: what follows from the configuration, written above it as comments.
        lists: which prompts it has, written down unless that was done before.
        rewards: what its rewards are made of, written down.
        resume: whether there should be a run; it may be made longer.

    Returns:
        The lock on it, taken.

    Raises:
        UsageError: it cannot be written, or another process has it or was there first.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(RunLock(directory))
            check_directory(config, resume)  # nobody has begun a run in between
            text = "".join(f"# {note}\n" for note in notes) + to_yaml(config)
            path = directory / "config.yaml"
            if not resume or load_config(str(path)).run.iterations != config.run.iterations:
                (directory / SCRATCH).write_text(text, encoding="utf-8")
                os.replace(directory / SCRATCH, path)
                # Of a run that is made longer: what it came to before says that it is finished.
                (directory / "evaluation.json").unlink(missing_ok=True)
            if lists is not None and not (directory / PROMPTS_FILE).is_file():
                write_whole(directory / PROMPTS_FILE, json.dumps(lists, indent=2) + "\n")
            if rewards is not None:
                write_record(directory, rewards)
            (directory / "samples").mkdir(exist_ok=True)
            stack.pop_all()  # the caller holds it now
        return lock
    except OSError as error:
        raise UsageError(
            f"output directory {directory} cannot be written ({error.strerror}); choose another "
            "with --run.output"
        ) from None


def check_alike(config: Config, lists: Mapping[str, ListRecord]) -> None:
    """Find out whether all processes are about to do the same run.

    Args:
        config: the run's.
        lists: of `describe_lists`.

    Raises:
        UsageError: another one has another configuration, or other prompts.
    """
    said = {"configuration": to_yaml(config), "prompts": lists}
    for number, other in enumerate(processes.exchange(said, "the configuration")):
        for name, value in said.items():
            if other[name] != value:
                raise UsageError(
                    f"process {number} has another {name} than process {processes.rank()}; "
                    "expected all to be started by the same command, with the same files"
                )


def open_directory(
    config: Config,
    directory: Path,
    notes: Sequence[str],
    *,
    lists: Mapping[str, ListRecord],
    rewards: RewardRecord,
    resume: bool,
) -> AbstractContextManager[Any]:
    """Make the run directory (`make_directory`) in the process that writes, for all to use.

    Raises:
        UsageError: as there, or another process does not see it.
    """
    lock: AbstractContextManager[Any] = contextlib.nullcontext()
    if processes.leads():
        lock = make_directory(config, directory, notes, lists=lists, rewards=rewards, resume=resume)
    processes.wait_for_all("the run directory")
    if not (directory / "config.yaml").is_file():
        raise UsageError(
            f"run directory {directory} is not there for process {processes.rank()}, though "
            "process 0 has made it; expected a folder that all processes share: set --run.output"
        )
    return lock


def at_commit(config: Config, source: Path) -> Config:
    """Return a run's configuration with the commit of its hub repository as its revision.

    So a run that is resumed, exported or compared with its base reads the model that it began
    with, whatever its branch holds by then.

    Args:
        config: the run's.
        source: where its checkpoint was found, of `local_directory`.
    """
    commit = commit_of(config.model.pretrained, source)
    if commit is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, revision=commit))


def load_model(config: Config, source: Path) -> StableDiffusion:
    """Load the pipeline: frozen parts in the compute dtype, trained parameters in float32."""
    dtype = DTYPES[config.model.dtype]
    full = config.model.trainable == "full"
    model = StableDiffusion.from_pretrained(
        source,
        dtype=dtype,
        param_dtype=dtype,
        unet_param_dtype=jnp.float32 if full else dtype,
        variant=config.model.variant,
    )
    model.unet.gradient_checkpointing = config.model.chosen("gradient_checkpointing")
    return model


def lora_options(config: Config) -> dict[str, LoRAOptions] | None:
    """Return the adapters by component, or None where all parameters of the UNet are trained."""
    model = config.model
    if model.trainable == "full":
        return None
    targets = {"unet": model.lora_targets}
    if model.train_text_encoder:
        targets |= dict.fromkeys(ENCODERS, model.text_encoder_targets)
    return {
        part: LoRAOptions(targets=chosen, rank=model.lora_rank, alpha=model.lora_alpha)
        for part, chosen in targets.items()
    }
