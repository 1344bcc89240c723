"""What a run's numbers warn of, in sentences that say what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo.gallery import Entry, Gallery

_LAST = 10  # iterations that a warning about the present state looks at


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
    found += _hacking(directory, gold)
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
            f"{zero:.0%} of the groups have equal rewards, which teach nothing: the reward is too "
            "coarse, too easy or too hard for these prompts, or the groups are too small"
        )
    return found


def _recent(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows[-_LAST:] if math.isfinite(row.get(name, math.nan))]
    return sum(values) / len(values) if values else None


def _hacking(directory: Path, gold: Mapping[str, float]) -> list[str]:
    """Return signs that the reward rose at the cost of what it stands for."""
    gallery = Gallery(directory)
    evaluations = gallery.entries("evaluation")
    if len(evaluations) < 2:
        return []
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
    measured = [(entry.summary or {}).get("metrics", {}) for entry in evaluations]
    before, after = measured[0].get("diversity"), measured[-1].get("diversity")
    if before and after is not None and math.isfinite(after) and after < 0.5 * before:
        found.append(
            f"the diversity of a prompt's images fell from {before:.3g} to {after:.3g}: the model "
            "draws nearly the same picture again and again"
        )
    return found
