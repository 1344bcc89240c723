"""What rewards returned: checked, combined into one number an image, and described."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from diffusion_grpo.errors import RewardError

Combination = Literal["weighted", "min", "ensemble"]


@dataclass(frozen=True)
class RewardResult:
    """What a batch of images scored.

    Attributes:
        scores: reward name to float32 [B], unweighted; NaN where a reward gave none and its
            failure policy is to drop the group.
        total: float32 [B], combined; NaN for every image of a dropped group.
        seconds: reward name to the wall time it took, transfers included.
        weights: reward name to its weight.
        kept: bool [B], false for the images of dropped groups.
        cached: name of a cached reward to the share of images whose score was known already.
        notes: what was retried or dropped, for people.
    """

    scores: dict[str, np.ndarray]
    total: np.ndarray
    seconds: dict[str, float]
    weights: dict[str, float]
    kept: np.ndarray
    cached: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def matrix(self) -> np.ndarray:
        """The unweighted scores as float32 [B, K], one column a reward, in their order."""
        return np.stack(list(self.scores.values()), axis=1)

    def metrics(self) -> dict[str, float]:
        """Return the statistics of the total and of each reward over the images kept.

        `reward/mean`, `/std`; each reward's `reward/<name>/mean`, `/std`, `/min`, `/max` and
        `time/reward/<name>`; `reward/correlation/<a>:<b>`, Pearson's, of every two rewards that
        are not constant; where it applies `reward/dropped`, `reward/<name>/dropped` and
        `reward/<name>/cached`, shares of the images.
        """
        kept = self.kept
        metrics: dict[str, Any] = {
            "reward/mean": self.total[kept].mean(),
            "reward/std": self.total[kept].std(),
        }
        for name, scores in self.scores.items():
            for statistic in ("mean", "std", "min", "max"):
                metrics[f"reward/{name}/{statistic}"] = getattr(scores[kept], statistic)()
            metrics[f"time/reward/{name}"] = self.seconds[name]
            if not kept.all():
                metrics[f"reward/{name}/dropped"] = np.isnan(scores).mean()
        for name, share in self.cached.items():
            metrics[f"reward/{name}/cached"] = share
        metrics |= correlations({name: scores[kept] for name, scores in self.scores.items()})
        if not kept.all():
            metrics["reward/dropped"] = 1.0 - kept.mean()
        return {name: float(value) for name, value in metrics.items()}


def correlations(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return Pearson's correlation of every two rewards, as `reward/correlation/<a>:<b>`.

    Pairs with a constant reward have none and are left out.
    """
    centered = {k: v.astype(np.float64) - v.astype(np.float64).mean() for k, v in scores.items()}
    found = {}
    for (first, a), (second, b) in itertools.combinations(centered.items(), 2):
        if np.ptp(scores[first]) and np.ptp(scores[second]):
            found[f"reward/correlation/{first}:{second}"] = float(
                a @ b / np.sqrt((a @ a) * (b @ b))
            )
    return found


def combine(
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    kind: Combination = "weighted",
    *,
    pessimism: float = 1.0,
) -> np.ndarray:
    """Combine several rewards into one.

    With the weighted scores x_k = w_k r_k of K rewards:

    - `weighted`: Σ_k x_k
    - `min`: min_k x_k, the worst-case optimization of Coste et al., "Reward Model Ensembles Help
      Mitigate Overoptimization" (2023)
    - `ensemble`: mean_k x_k − κ std_k x_k, population std: where the members disagree, a high mean
      is not trusted. Their uncertainty-weighted optimization, with the standard deviation in
      place of the variance, so that κ has no unit.

    The last two compare the x_k with each other: choose weights that bring them to one scale.

    Args:
        scores: reward name to float32 [B].
        weights: reward name to its weight; the same names.
        kind: see above.
        pessimism: κ of the ensemble.

    Returns:
        float32 [B]; computed in float64, so that the order of the rewards does not show.

    Raises:
        ValueError: the names differ.
    """
    if set(scores) != set(weights):
        raise ValueError(f"scores of {sorted(scores)} but weights of {sorted(weights)}")
    terms = np.stack([weights[name] * score.astype(np.float64) for name, score in scores.items()])
    if kind == "weighted":
        total = terms.sum(axis=0)
    elif kind == "min":
        total = terms.min(axis=0)
    else:
        total = terms.mean(axis=0) - pessimism * terms.std(axis=0)
    return total.astype(np.float32)


def validate_scores(
    name: str, returned: Any, count: int, *, indices: Sequence[int] | None = None
) -> np.ndarray:
    """Check that a reward returned one finite number an image.

    Args:
        name: the reward, for messages.
        returned: what it returned: an array of any library, or a list of numbers.
        count: how many images it was given.
        indices: the number of each of them in its batch, for messages; 0, 1, … by default.

    Returns:
        float32 [count].

    Raises:
        RewardError: another shape, another count, not numbers, or NaN or infinity; names the reward
            and the first bad index.
    """
    indices = range(count) if indices is None else indices
    expected = f"expected float32 of shape ({count},), one score an image"
    if returned is None:
        raise RewardError(f"reward {name!r} returned None, {expected}: is a return missing?")
    try:
        scores = np.asarray(returned)
    except Exception as error:
        raise RewardError(
            f"reward {name!r} returned {type(returned).__name__}, which is not an array "
            f"({type(error).__name__}: {error}); {expected}"
        ) from error
    if scores.ndim != 1:
        mend = "; squeeze its last axis" if scores.shape == (count, 1) else ""
        raise RewardError(f"reward {name!r} returned shape {scores.shape}, {expected}{mend}")
    if len(scores) < count:
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {count} images: "
            f"image {indices[len(scores)]} is the first without one"
        )
    if len(scores) > count:
        after = indices[-1] + 1 if count else 0
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {count} images: "
            f"score {after} is the first without an image"
        )
    with np.errstate(over="ignore"):
        for index, score in zip(indices, scores, strict=True):
            # Every real number type, ml_dtypes' bfloat16 included, casts safely to float64.
            if not np.can_cast(np.asarray(score).dtype, np.float64, casting="safe"):
                raise RewardError(
                    f"reward {name!r} returned {score!r} ({scores.dtype}) for image {index}, "
                    f"not a number; {expected}"
                )
        result = scores.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(result))
    if bad.size:
        raise RewardError(
            f"reward {name!r} returned {scores[bad[0]]} for image {indices[int(bad[0])]} "
            f"({bad.size} of {count} scores are not finite in float32)"
        )
    return result
