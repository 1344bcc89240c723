"""Which checkpoint a word on the command line means."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import Prompt, evaluated_on, load_heldout

if TYPE_CHECKING:
    from diffusion_grpo.config import Config


class Source(NamedTuple):
    """Where a model is read from: what `StableDiffusion.from_pretrained` takes.

    Attributes:
        place: a directory, an embedded name or a hub id.
        revision: of a hub repository; None is its main branch.
        variant: of the weight files; None takes those without one.
    """

    place: str
    revision: str | None = None
    variant: str | None = None


class RunModel(NamedTuple):
    """A model of a run, as a word on the command line names it.

    Attributes:
        run: the run directory.
        which: `final`, `best`, `base`, or what else stood after the @.
    """

    run: Path
    which: str

    @property
    def trained(self) -> bool:
        """Whether the run made it, and did not start from it."""
        return self.which != "base"

    def config(self) -> dict[str, Any]:
        """Return the run's `config.yaml`, section by section.

        Raises:
            UsageError: it is not the configuration of a run.
        """
        path = self.run / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
            raise UsageError(
                f"{path} is not the configuration of a run; expected what `train` wrote there: "
                "sections such as model and prompts"
            )
        return values


def run_model(word: str) -> RunModel | None:
    """Return which model of which run a word means; None for a checkpoint."""
    name, at, which = word.rpartition("@")
    run = Path(name if at else word).expanduser()
    return RunModel(run, which if at else "final") if (run / "config.yaml").is_file() else None


class RunPrompts(NamedTuple):
    """What a run is evaluated on.

    Attributes:
        prompts: the whole list.
        which: whether it was held out of training, or is the training list.
    """

    prompts: Sequence[Prompt]
    which: Literal["held-out", "training"]


def run_prompts(words: Sequence[str]) -> RunPrompts | None:
    """Return what the first run among the models is evaluated on; None without a run.

    Args:
        words: models as given on the command line.

    Raises:
        UsageError: its list cannot be read.
    """
    for found in map(run_model, words):
        if found is not None:
            lists = found.config().get("prompts", {})
            if "train" not in lists:
                raise UsageError(
                    f"{found.run / 'config.yaml'} names no prompts.train; give the prompts by "
                    "--prompts NAME|FILE"
                )
            share = lists.get("heldout_share", 0.0)
            heldout = lists.get("heldout")
            try:
                prompts = load_heldout(lists["train"], heldout, share)[1]
            except UsageError as error:
                raise UsageError(
                    f"{error} (named by {found.run / 'config.yaml'}; where it is not at hand, give "
                    "prompts by --prompts NAME|FILE)"
                ) from None
            return RunPrompts(prompts, evaluated_on(heldout, share))
    return None


def find_model(word: str) -> Source:
    """Return the checkpoint that a word means: a checkpoint, or a model of a run.

    Args:
        word: a directory, an embedded name or a hub id; or a run directory, which stands for its
            trained model, `RUN@best` for its best one, and `RUN@base` for what it started from, at
            the run's own `model.revision` and `model.variant`.

    Raises:
        UsageError: the run does not have that model, or its best one was not kept.
    """
    found = run_model(word)
    if found is None:
        return Source(word)
    run, which = found
    if which == "base":
        model = found.config().get("model", {})
        if "pretrained" not in model:
            raise UsageError(
                f"{run / 'config.yaml'} names no model.pretrained, which {word!r} stands for; "
                "expected what `train` wrote there"
            )
        return Source(str(model["pretrained"]), model.get("revision"), model.get("variant"))
    if which not in ("final", "best"):
        raise UsageError(
            f"{word!r}: a run has the models final, best and base; expected one of them, or a "
            f"folder that `diffusion-grpo export {run}@N --output FOLDER` wrote"
        )
    if which == "best" and not (run / which).is_dir():
        _check_final_is_best(word, run)
        which = "final"
    if not (run / which).is_dir():
        raise UsageError(
            f"{word!r}: the run has no final/; wait for its end, or end it with `diffusion-grpo "
            f"train --resume {run}`, or take a checkpoint of it with `diffusion-grpo export "
            f"{run}@N --output FOLDER`{_at(run)}"
        )
    return Source(str(run / which))


def find_models(
    words: Sequence[str], *, revision: str | None = None, variant: str | None = None
) -> list[Source]:
    """Return the checkpoints that words mean, as `find_model` does.

    Args:
        words: as there.
        revision: of those that no run trained; None leaves a run's base at the run's own.
        variant: likewise.

    Raises:
        UsageError: as there; or a revision or variant is given, but runs trained all the models.
    """
    sources = [find_model(word) for word in words]
    trained = [found is not None and found.trained for found in map(run_model, words)]
    options = {"revision": revision, "variant": variant}
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if all(trained):
            raise UsageError(
                f"{name} is {value!r}, but what a run trained is written without one: it is for "
                f"checkpoints and for RUN@base; leave --{name} out"
            )
    return [
        source if own else source._replace(**given)
        for own, source in zip(trained, sources, strict=True)
    ]


def with_found_model(config: Config) -> Config:
    """Return a new run's configuration with the checkpoint that its `model.pretrained` means.

    Args:
        config: whose `model.pretrained` may be a word as `find_model` takes it.

    Raises:
        UsageError: as `find_models`.
    """
    model = config.model
    found = find_models([model.pretrained], revision=model.revision, variant=model.variant)[0]
    place = dict(zip(("pretrained", "revision", "variant"), found, strict=True))
    return dataclasses.replace(config, model=dataclasses.replace(model, **place))


def _check_final_is_best(word: str, run: Path) -> None:
    """Find out from `best.json` whether the model of a run without best/ is its final one.

    Raises:
        UsageError: it is not, or nothing says so; the message says what the best is.
    """
    path = run / "best.json"
    if not path.is_file():
        raise UsageError(
            f"{word!r}: the run has no best/; expected a run with --eval.every, which keeps one"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model, done = str(found["model"]), int(found["iterations"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f'{path} does not say which model is the best; expected JSON with "model" and '
            f'"iterations", as `train` writes it; take {run} for the final model'
        ) from None
    if model == "final/":
        return
    if model == "the untrained model":
        raise UsageError(
            f"{word!r}: no evaluation of the run was better than that of the untrained model; take "
            f"{run} for the final model, or {run}@base for what it started from"
        )
    mend = f"take {run} for the final model, and --eval.keep-best True in the next run"
    if (run / "checkpoints" / str(done)).is_dir():
        mend = f"its checkpoint is there: `diffusion-grpo export {run}@{done} --output FOLDER`"
    raise UsageError(
        f"{word!r}: the best evaluation was after {done} iterations, but the run has no best/ "
        f"({path.name} says: {model}); {mend}"
    )


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

    A run's `clip` is then scored with the CLIP model that the run was trained on. Another reward of
    that name, such as `my/clip.py`, has none of its options.

    Args:
        words: models as given on the command line; runs among them.
        rewards: in the form of `train --reward`.
        given: `NAME.OPTION=VALUE` each; they come before the run's.

    Raises:
        UsageError: a reward is malformed, or a run's `config.yaml` is.
    """
    from diffusion_grpo.reward_specs import names_of_same

    taken = {option.partition("=")[0] for option in given}
    for found in map(run_model, words):
        if found is None:
            continue
        config = found.config()
        section, gold = config.get("reward", {}), config.get("eval", {}).get("gold", ())
        options = section.get("options", ())
        names = names_of_same(rewards, (*section.get("rewards", ()), *gold))
        keys = [option.partition("=")[0] for option in options]
        own = [
            option
            for key, option in zip(keys, options, strict=True)
            if key.rpartition(".")[0] in names and key not in taken
        ]
        return (*given, *own)
    return tuple(given)
