"""Rewards in several processes: each scores its own images, and all learn every score."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_grpo import processes
from diffusion_grpo.errors import RewardError
from diffusion_grpo.mesh import alone
from diffusion_grpo.reward import RewardSet
from diffusion_grpo.reward_scores import RewardResult
from diffusion_grpo.reward_scoring import Scoring, check_dropped


def load_rewards(specs: Any, **settings: Any) -> RewardSet:
    """Load rewards (`RewardSet.load`), models among them onto this process's devices."""
    with alone():
        return RewardSet.load(specs, **settings)


def start_scoring(
    rewards: RewardSet,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    *,
    group_size: int,
    may_drop: bool = False,
    order: np.ndarray | None = None,
) -> Scoring | DividedScoring:
    """Prepare to score this process's images as they come (`RewardSet.start`).

    Args:
        rewards: the rewards.
        prompts: texts of this process's images, those of a group side by side.
        metadata: a dictionary each.
        group_size: G.
        may_drop: whether groups may be left out.
        order: the places of these images in the order in which they will come.
    """
    options: dict[str, Any] = {"group_size": group_size, "may_drop": may_drop, "order": order}
    if processes.count() == 1:
        return rewards.start(prompts, metadata, **options)
    # How many may be dropped is a share of all groups, not of this process's.
    each = dataclasses.replace(rewards, max_dropped=1.0)
    limit = rewards.max_dropped if may_drop else 0.0
    return DividedScoring(each.start(prompts, metadata, **options), group_size, limit)


class DividedScoring:
    """Scores this process's images; `result` is that of all processes' images, in their order.

    Where a reward fails in one process it fails in all, with the same message, once the images are
    drawn: so that all can save what is finished.
    """

    def __init__(self, scoring: Scoring, group_size: int, max_dropped: float) -> None:
        """Take over the scoring of this process's images."""
        self._scoring, self._group_size, self._max_dropped = scoring, group_size, max_dropped
        self._failure: RewardError | None = None

    def __enter__(self) -> DividedScoring:
        """Return itself."""
        self._scoring.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the threads."""
        self._scoring.__exit__(*error)

    def add(self, images: Any) -> None:
        """Take this process's next images (`own_rows`); see `Scoring.add`."""
        if self._failure is None:
            with alone(), self._failing():
                self._scoring.add(images)

    def result(self) -> RewardResult:
        """Wait for the scores of all processes.

        Raises:
            RewardError: a reward failed in any of them, or more groups were dropped than may be.
        """
        found: dict[str, Any] = {}
        if self._failure is None:
            with alone(), self._failing():
                result = self._scoring.result()
                fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
                fields["scores"] = {name: x.tolist() for name, x in result.scores.items()}
                found = fields | {"total": result.total.tolist(), "kept": result.kept.tolist()}
        if self._failure is not None:
            found = {"failure": str(self._failure)}
        every: list[dict[str, Any]] = processes.exchange(found, "the scores of their images")
        for number, each in enumerate(every):
            if "failure" in each:
                raise RewardError(f"process {number}: {each['failure']}") from self._failure
        joined = join_results(every)
        check_dropped(~joined.kept, self._group_size, self._max_dropped, joined.notes)
        return joined

    @contextlib.contextmanager
    def _failing(self) -> Any:
        """Keep a reward's failure for `result`, where all processes learn of it."""
        try:
            yield
        except RewardError as error:
            self._failure = error


def join_results(every: Sequence[Mapping[str, Any]]) -> RewardResult:
    """Join what each process's images scored, the fields of `RewardResult` as JSON has them.

    The time of a reward is that of the slowest process.
    """
    first = every[0]
    counts = np.array([len(each["total"]) for each in every])

    def joined(parts: Sequence[Any], dtype: Any) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype) for part in parts])

    return RewardResult(
        scores={
            name: joined([each["scores"][name] for each in every], np.float32)
            for name in first["scores"]
        },
        total=joined([each["total"] for each in every], np.float32),
        seconds={n: max(each["seconds"][n] for each in every) for n in first["seconds"]},
        weights=first["weights"],
        kept=joined([each["kept"] for each in every], bool),
        cached={
            name: float(np.average([each["cached"][name] for each in every], weights=counts))
            for name in first["cached"]
        },
        notes=tuple(
            f"process {number}: {note}"
            for number, each in enumerate(every)
            for note in each["notes"]
        ),
    )
