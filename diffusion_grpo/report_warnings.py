"""What a run's numbers warn of, in sentences that say what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo.gallery import Entry, Gallery
from diffusion_grpo.stats import MONITORS

_LAST = 10  # iterations that a warning about the present state looks at
_CHANGED = 0.3  # share of a plain measure of the pictures past which they are worth a look


def run_warnings(
    directory: Path, rows: Sequence[dict[str, Any]], gold: Mapping[str, float]
) -> list[str]:
    """Return the warnings, most serious first.

    Args:
        directory: the run's.
        rows: the lines of `metrics.jsonl`.
        gold: name → weight of the gold rewards; below 0, less is better.
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
    found += _hacking(directory, rows, gold)
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
    directory: Path, rows: Sequence[dict[str, Any]], gold: Mapping[str, float]
) -> list[str]:
    """Return signs that the reward rose at the cost of what it stands for."""
    gallery = Gallery(directory)
    evaluations = gallery.entries("evaluation")
    if len(evaluations) < 2:
        return _same_picture(rows, {}, {})
    first, last = evaluations[0], evaluations[-1]
    found = []

    def mean(entry: Entry, name: str) -> float:
        return float(np.nanmean(gallery.numbers(entry, name)))

    rose = mean(last, "total") > mean(first, "total")
    for name, weight in gold.items():
        got_worse = weight * mean(last, name) < weight * mean(first, name)
        if rose and got_worse:
            found.append(
                f"the gold reward {name} {'fell' if weight > 0 else 'rose'} from "
                f"{mean(first, name):.4g} to {mean(last, name):.4g} while the trained reward "
                "rose: it may be being hacked; raise grpo.beta, stop earlier, or take the best "
                "checkpoint"
            )
    before, after = ((entry.summary or {}).get("metrics", {}) for entry in (first, last))
    for name in MONITORS if rose and not gold else ():
        start, end = before.get(name), after.get(name)
        if start and end is not None and abs(end / start - 1) > _CHANGED:
            found.append(
                f"the {name.replace('_', ' ')} of the held-out pictures went from {start:.3g} to "
                f"{end:.3g} while the reward rose, and no gold reward (eval.gold) says whether "
                "they are better: look at them, and if the reward is being hacked raise grpo.beta"
            )
    return found + _same_picture(rows, before, after)


def _same_picture(
    rows: Sequence[dict[str, Any]], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[str]:
    """Say if the diversity fell: of the held-out pictures if it is known, else of the rollouts."""
    start, end, whose = before.get("diversity"), after.get("diversity"), "a held-out prompt's"
    if start is None and len(rows) >= 2 * _LAST:
        start, end = _recent(rows[:_LAST], "diversity"), _recent(rows, "diversity")
        whose = "a prompt's"
    if not start or end is None or not math.isfinite(end) or end >= 0.5 * start:
        return []
    return [
        f"the diversity of {whose} images fell from {start:.3g} to {end:.3g}: the model draws "
        "nearly the same picture again and again"
    ]
