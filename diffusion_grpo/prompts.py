"""Prompt lists, and which prompts an iteration trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.resources import resource_path

_SUFFIXES = (".jsonl", ".txt")  # in the order of preference


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward may want to know about it."""

    text: str
    """What the model is asked for."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Every other key of its JSON line, handed to the rewards as it is."""


def load_prompts(name_or_file: str | Path) -> list[Prompt]:
    """Load a prompt list.

    A `.txt` file has one prompt a line; blank lines and lines that begin with `#` are left out. A
    `.jsonl` file has one object a line, with the text under `"prompt"` and any metadata beside it.

    Args:
        name_or_file: an existing file; or the name of a list under `prompts/`, without its suffix.

    Returns:
        The prompts in the order of the file; never empty.

    Raises:
        UsageError: no such list or file; a file with no prompt in it; a line that is no valid JSON
            object with a text under `"prompt"` (its number is named).
    """
    path = _find(str(name_or_file))
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompt file {path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        prompts = [
            _from_json(line, where=f"prompt file {path}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    else:
        texts = (line.strip() for line in lines)
        prompts = [Prompt(text) for text in texts if text and not text.startswith("#")]
    if not prompts:
        raise UsageError(f"prompt file {path}: no prompt in it; expected one a line")
    return prompts


def list_prompts() -> list[str]:
    """Return the names of the prompt lists under `prompts/`, sorted."""
    folder = resource_path("prompts")
    if not folder.is_dir():
        return []
    return sorted({path.stem for path in folder.iterdir() if path.suffix in _SUFFIXES})


def prompt_batch(
    prompts: Sequence[Prompt], seed: int, iteration: int, num_prompts: int
) -> list[tuple[int, Prompt]]:
    """Return the prompts of one iteration, as a function of (seed, iteration) alone.

    The list is shuffled anew for every epoch, and the iterations take `num_prompts` each from the
    endless sequence of epochs: every prompt is visited once before any is visited again. A batch
    that spans two epochs, or is longer than the list, can hold the same prompt more than once;
    each is a group of its own.

    Args:
        prompts: the whole list, N prompts.
        seed: of the run.
        iteration: counted from 0.
        num_prompts: P, the size of the batch.

    Returns:
        P pairs of a prompt's index in the list and the prompt.

    Raises:
        UsageError: the list is empty, or `num_prompts` is below 1.
    """
    if not prompts:
        raise UsageError("the list of prompts is empty; expected at least one prompt")
    if num_prompts < 1:
        raise UsageError(f"num_prompts is {num_prompts}; expected 1 or more")
    start = iteration * num_prompts
    first_epoch = start // len(prompts)
    last_epoch = (start + num_prompts - 1) // len(prompts)
    order = np.concatenate(
        [
            np.random.default_rng([seed, epoch]).permutation(len(prompts))
            for epoch in range(first_epoch, last_epoch + 1)
        ]
    )
    offset = start - first_epoch * len(prompts)
    return [(int(index), prompts[index]) for index in order[offset : offset + num_prompts]]


def _find(name_or_file: str) -> Path:
    """Return the file of a prompt list, or raise a `UsageError` that proposes another."""
    if not name_or_file.strip():
        raise UsageError("the name of the prompt list is empty; expected a name or a file")
    path = Path(name_or_file).expanduser()
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise UsageError(
                f"prompt file {name_or_file!r} ends in {path.suffix!r}; expected '.txt' (a prompt "
                "a line) or '.jsonl' (a JSON object a line)"
            )
        return path
    if path.name == name_or_file:
        for suffix in _SUFFIXES:
            named = resource_path("prompts", name_or_file + suffix)
            if named.is_file():
                return named
    names = list_prompts()
    raise UsageError(
        f"prompts {name_or_file!r}: no such list or file{suggest(name_or_file, names)}; expected a "
        f".txt or .jsonl file, or one of the lists {', '.join(names) or '(none found)'}"
    )


def _from_json(line: str, *, where: str) -> Prompt:
    """Read one line of a `.jsonl` prompt file."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f'{where}: {line.strip()!r}; expected an object such as {{"prompt": "…"}}')
    text = values.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'{where}: "prompt" is {text!r}; expected text')
    return Prompt(text.strip(), values)
