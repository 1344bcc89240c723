"""Prompt lists, how one is split, and which prompts an iteration trains on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompt_files import describe_prompts, list_prompts, load_prompts
from diffusion_grpo.prompt_types import (
    ChosenPrompts,
    LazyPrompts,
    Prompt,
    fingerprint,
    weight_shares,
)

__all__ = [
    "ChosenPrompts",
    "LazyPrompts",
    "Prompt",
    "describe_prompts",
    "evaluated_on",
    "fingerprint",
    "is_held_out",
    "list_prompts",
    "load_heldout",
    "load_prompts",
    "overlap_note",
    "prompt_batch",
    "shuffled_place",
    "split_prompts",
    "upcoming_prompts",
]

_SHUFFLED_WHOLE = 1_000_000  # a longer list is shuffled without a table of its places
_MAX_SPLIT = 2_000_000  # prompts that are hashed one by one to hold some out
_MAX_COMPARED = 100_000  # prompts that are compared with those held out, in a second or so


def is_held_out(text: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out share, by its text alone.

    The first 8 bytes of SHA-256 of the UTF-8 text, read as a number in [0, 1), are below `share`:
    so a prompt stays on its side when the list grows, is reordered, or is used by another run.

    Args:
        text: the prompt.
        share: 0 to 1.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def split_prompts(
    prompts: Sequence[Prompt], share: float
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Split a list into what is trained on and what is held out, by `is_held_out`.

    Args:
        prompts: the whole list.
        share: of the prompts to hold out, between 0 and 1.

    Returns:
        (training prompts, held-out prompts), in the order of the list.

    Raises:
        UsageError: the share is out of range, one side would be empty, or the list is too long to
            be hashed.
    """
    if not 0 < share < 1:
        raise UsageError(f"the held-out share is {share}; expected a number between 0 and 1")
    if len(prompts) > _MAX_SPLIT:
        raise UsageError(
            f"a list of {len(prompts)} prompts is too long to be split by a hash of each (at most "
            f"{_MAX_SPLIT}): give a held-out list of its own"
        )
    held = np.array([is_held_out(prompt.text, share) for prompt in prompts], bool)
    if held.all() or not held.any():
        side = "the training" if held.all() else "the held-out"
        raise UsageError(
            f"a held-out share of {share} leaves {side} side of {len(prompts)} prompts empty: "
            "change the share, or give a held-out list of its own"
        )
    if isinstance(prompts, LazyPrompts):
        train, heldout = (ChosenPrompts(prompts, np.flatnonzero(side)) for side in (~held, held))
        return train, heldout
    return _where(prompts, ~held), _where(prompts, held)


def load_heldout(
    train: str, heldout: str | None, share: float
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Load what a run trains on and what it holds out.

    Args:
        train: the training list, as `load_prompts` takes it.
        heldout: a list of its own for evaluation, or None.
        share: without one, the share of the training list that is held out; 0 holds nothing out,
            and the evaluation is on the training list.

    Returns:
        (training prompts, held-out prompts).

    Raises:
        UsageError: as `load_prompts` and `split_prompts`.
    """
    prompts = load_prompts(train)
    if heldout is not None:
        return prompts, load_prompts(heldout)
    return split_prompts(prompts, share) if share else (prompts, prompts)


def evaluated_on(heldout: str | None, share: float) -> Literal["held-out", "training"]:
    """Return which prompts the evaluations are on that `load_heldout` loads.

    Args:
        heldout: as there.
        share: as there.
    """
    return "held-out" if heldout is not None or share > 0 else "training"


def overlap_note(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> str | None:
    """Say which of the held-out prompts that an evaluation draws are trained on; None for none.

    Args:
        train: the training list; one too long to be gone through is not looked at.
        heldout: the prompts that are drawn, from a list of their own.
    """
    if len(train) > _MAX_COMPARED:
        return None
    asked = {prompt.text for prompt in heldout}
    trained = asked.intersection(prompt.text for prompt in train)
    shared = [prompt.text for prompt in heldout if prompt.text in trained]
    if not shared:
        return None
    return (
        f"{len(shared)} of the {len(heldout)} held-out prompts are trained on too, such as "
        f"{shared[0]!r}: what the evaluation says of them is not of prompts never seen; give "
        "--prompts.heldout another list, or None with --prompts.heldout-share 0.1"
    )


def _where(prompts: Sequence[Prompt], mask: Iterable[Any]) -> list[Prompt]:
    return [prompt for prompt, chosen in zip(prompts, mask, strict=True) if chosen]


def prompt_batch(
    prompts: Sequence[Prompt], seed: int, iteration: int, num_prompts: int
) -> list[tuple[int, Prompt]]:
    """Return the prompts of one iteration, as a function of (seed, iteration) alone.

    Where all prompts weigh the same, the list is shuffled anew for every epoch, and the iterations
    take `num_prompts` each from the endless sequence of epochs: every prompt is visited once before
    any is visited again. Otherwise prompts are drawn in proportion to their weights, independently
    of each other. A batch that spans two epochs, is longer than the list, or is drawn by weight can
    hold the same prompt more than once; each is a group of its own.

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
    drawn = _draw_by_weight(prompts, np.random.default_rng([seed, iteration]), num_prompts)
    if drawn is not None:
        return [(index, prompts[index]) for index in drawn]
    start = iteration * num_prompts
    if len(prompts) > _SHUFFLED_WHOLE:
        places = range(start, start + num_prompts)
        chosen = [
            shuffled_place(place % len(prompts), len(prompts), (seed, place // len(prompts)))
            for place in places
        ]
        return [(index, prompts[index]) for index in chosen]
    first_epoch = start // len(prompts)
    last_epoch = (start + num_prompts - 1) // len(prompts)
    order = np.concatenate(
        [
            np.random.default_rng([seed, epoch]).permutation(len(prompts))
            for epoch in range(first_epoch, last_epoch + 1)
        ]
    )
    offset = start - first_epoch * len(prompts)
    return [(int(index), prompts[index]) for index in order[offset : offset + num_prompts].tolist()]


def upcoming_prompts(
    prompts: Sequence[Prompt],
    seed: int,
    iterations: range,
    num_prompts: int,
    *,
    most: int = 4096,
) -> tuple[dict[int, int], int]:
    """Return which prompts to encode before an iteration: all, or those of the next few iterations.

    A list as long as all combinations of a template is never encoded as a whole.

    Args:
        prompts: the whole list.
        seed: of the run.
        iterations: those that are left.
        num_prompts: P.
        most: prompts that are encoded at a time, at least those of one iteration.

    Returns:
        Each prompt's index in the list → its row among those encoded; and the iteration before
        which the next call is due.
    """
    if len(prompts) <= most:
        return {index: index for index in range(len(prompts))}, iterations.stop
    stop = min(iterations.stop, iterations.start + max(1, most // num_prompts))
    visited = (
        index
        for iteration in range(iterations.start, stop)
        for index, _ in prompt_batch(prompts, seed, iteration, num_prompts)
    )
    return {index: row for row, index in enumerate(dict.fromkeys(visited))}, stop


def _draw_by_weight(
    prompts: Sequence[Prompt], rng: np.random.Generator, count: int
) -> list[int] | None:
    """Draw indices in proportion to the weights; None where all weights are the same."""
    if isinstance(prompts, LazyPrompts):
        return prompts.draw(rng, count) if prompts.weighted else None
    shares = weight_shares(prompts)
    return (
        None if np.all(shares == shares[0]) else rng.choice(len(shares), count, p=shares).tolist()
    )


def shuffled_place(index: int, count: int, key: tuple[int, ...]) -> int:
    """Return where a shuffle of 0 … count − 1 puts `index`, without making the whole shuffle.

    A Feistel network of four rounds is a permutation of the numbers of an even number of bits
    (Luby & Rackoff 1988); a result past the last is sent through it again until it is none.

    Args:
        index: 0 to count − 1.
        count: N.
        key: what the shuffle is a function of.
    """
    half = max(1, math.ceil((count - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(4):
            data = repr((key, number, right)).encode()
            mixed = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < count:
            return index
