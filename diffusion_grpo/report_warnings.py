"""What a run's numbers warn of, in sentences that say what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_grpo.gallery import Entry
from diffusion_grpo.stats import MONITORS, by_prompt, standard_error

_LAST = 10  # iterations that a warning about the present state looks at
_CHANGED = 0.3  # share of a plain measure of the pictures past which they are worth a look


def run_warnings(
    rows: Sequence[dict[str, Any]],
    evaluations: Sequence[Entry],
    gold: Mapping[str, float],
    evaluated: str = "held-out",
) -> list[str]:
    """Return the warnings, most serious first.

    Args:
        rows: the lines of `metrics.jsonl`.
        evaluations: the gallery's, in order.
        gold: name → weight of the gold rewards; below 0, less is better.
        evaluated: which prompts the evaluations are on, as `evaluated_on` says.
    """
    found = []
    for row in rows:
        broken = [n for n, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        broken = [name for name in broken if not name.startswith("eval/")]
        if broken:
            found.append(
                f"{broken[0]} was not finite in iteration {row['iteration'] + 1}: the learning "
                "rate may be too high"
            )
            break
    found += _hacking(rows, evaluations, gold, evaluated)
    skipped = sum(row.get("skipped", 0) for row in rows)
    if skipped:
        found.append(f"{skipped:g} updates were skipped because their gradient was not finite")
    clip = _recent(rows, "clip_fraction")
    if clip is not None and clip > 0.8:
        found.append(
            f"{clip:.0%} of the ratios are clipped: most images teach nothing after the first "
            "update; widen grpo.clip_low and grpo.clip_high, or lower the learning rate"
        )
    zero = _recent(rows, "advantage/zero_groups")
    if zero is not None and zero > 0.5:
        found.append(
            f"{zero:.0%} of the groups have equal rewards and teach nothing: the reward is too "
            "coarse, too easy or too hard for these prompts, or the groups are too small"
        )
    return found


def _recent(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows[-_LAST:] if math.isfinite(row.get(name, math.nan))]
    return sum(values) / len(values) if values else None


def _hacking(
    rows: Sequence[dict[str, Any]],
    evaluations: Sequence[Entry],
    gold: Mapping[str, float],
    evaluated: str,
) -> list[str]:
    """Return signs that the reward rose at the cost of what it stands for."""
    if len(evaluations) < 2:
        return _same_picture(rows, {}, {}, evaluated)
    first, last = evaluations[0], evaluations[-1]
    found = []

    def mean(entry: Entry, name: str) -> float:
        return float(np.nanmean(entry.numbers(name)))

    rose = mean(last, "total") > mean(first, "total")
    for name, weight in gold.items():
        if rose and _got_worse(first, last, name, weight):
            found.append(
                f"the gold reward {name} {'fell' if weight > 0 else 'rose'} from "
                f"{mean(first, name):.4g} to {mean(last, name):.4g}, by more than chance, while "
                "the trained reward rose: it may be being hacked; raise grpo.beta, stop earlier, "
                "or take the best checkpoint"
            )
    before, after = ((entry.summary or {}).get("metrics", {}) for entry in (first, last))
    for name in MONITORS if rose and not gold else ():
        start, end = before.get(name), after.get(name)
        if start and end is not None and abs(end / start - 1) > _CHANGED:
            found.append(
                f"the {name.replace('_', ' ')} of pictures of the {evaluated} prompts went from "
                f"{start:.3g} to {end:.3g} while the reward rose, and no gold reward (eval.gold) "
                "says whether they are better: look at them, and if the reward is being hacked "
                "raise grpo.beta"
            )
    return found + _same_picture(rows, before, after, evaluated)


def _got_worse(first: Entry, last: Entry, name: str, weight: float) -> bool:
    """Whether a reward got worse by more than chance, at the same prompts and seeds.

    The 95 % interval of the paired difference, as the evaluation has it, lies beyond 0; where it
    has none, the mean difference is more than two standard errors over prompts.
    """
    against = (last.summary or {}).get("against_base", {}).get(name, {})
    found = against.get("difference", {})
    if found.get("low") is not None:
        return (found["high"] if weight > 0 else -found["low"]) < 0
    change = last.numbers(name) - first.numbers(name)
    known = np.isfinite(change)  # a reward may have failed on the others
    gains = np.sign(weight) * by_prompt(change[known], np.arange(len(change))[known] // last.group)
    return len(gains) > 1 and bool(gains.mean() < -2 * standard_error(gains))


def _same_picture(
    rows: Sequence[dict[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    evaluated: str,
) -> list[str]:
    """Say if the diversity fell: of the evaluated pictures if it is known, else of the rollouts."""
    start, end, whose = before.get("diversity"), after.get("diversity"), f"a {evaluated} prompt's"
    if start is None and len(rows) >= 2 * _LAST:
        start, end = _recent(rows[:_LAST], "diversity"), _recent(rows, "diversity")
        whose = "a prompt's"
    if not start or end is None or not math.isfinite(end) or end >= 0.5 * start:
        return []
    return [
        f"the diversity of {whose} images fell from {start:.3g} to {end:.3g}: the model draws "
        "nearly the same picture again and again"
    ]
