"""A prompt, and lists of prompts that are made when they are asked for."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from diffusion_grpo.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward may want to know about it."""

    text: str
    """What the model is asked for."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the list says about it beside its text, handed to the rewards as it is."""
    weight: float = 1.0
    """How often it is drawn, relative to the other prompts of its list."""


class LazyPrompts(Sequence[Prompt]):
    """A list of prompts that are made when they are asked for; slices are plain lists."""

    def prompt_at(self, index: int) -> Prompt:
        """Return prompt `index`, 0 to N − 1."""
        raise NotImplementedError

    def source(self) -> str:
        """Return what the prompts are made of: where it is equal, so are they."""
        raise NotImplementedError

    weighted: bool = False
    """Whether the prompts are drawn by weights that differ."""

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Draw indices in proportion to the weights, independently of each other."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Make one prompt, or those of a slice."""
        if isinstance(index, slice):
            return [self.prompt_at(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self.prompt_at(place)


class ChosenPrompts(LazyPrompts):
    """Some prompts of a lazy list, by their places in it."""

    def __init__(self, prompts: LazyPrompts, places: np.ndarray) -> None:
        """Keep a list and the places chosen, int [n]; no prompt is kept."""
        self._prompts, self._places, self.weighted = prompts, places, prompts.weighted

    def __len__(self) -> int:
        """Return the number of prompts chosen."""
        return len(self._places)

    def prompt_at(self, index: int) -> Prompt:
        """Return chosen prompt `index`."""
        return self._prompts[int(self._places[index])]

    def source(self) -> str:
        """Return what the whole list is made of, and a digest of the places."""
        places = np.asarray(self._places, np.int64).tobytes()
        return f"{self._prompts.source()} {hashlib.sha256(places).hexdigest()}"

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        return weight_shares(self)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Draw indices in proportion to the weights, independently of each other."""
        return rng.choice(len(self), count, p=self._shares).tolist()


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return a digest that tells a list from any other: of texts, metadata, weights and order.

    Of a list whose prompts are made when they are asked for it is that of what they are made of.
    """
    digest = hashlib.sha256()
    if isinstance(prompts, LazyPrompts):
        digest.update(prompts.source().encode())
    else:
        for prompt in prompts:
            digest.update(repr((prompt.text, prompt.metadata, prompt.weight)).encode() + b"\n")
    return digest.hexdigest()


def weight_shares(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return each prompt's share of all weights, float64 [N]."""
    weights = np.array([prompt.weight for prompt in prompts], np.float64)
    return weights / weights.sum()


def read_weight(value: Any, *, where: str) -> float:
    """Return a weight as a number; text is what CSV has.

    Raises:
        UsageError: it is not a number above 0.
    """
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise UsageError(f'{where}: "weight" is {value!r}; expected a number above 0')
    return weight
