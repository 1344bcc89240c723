"""What an evaluation came to, for JSON and for people: intervals, comparisons, tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_grpo.evaluate import Evaluation
from diffusion_grpo.stats import Interval, bootstrap_mean, by_prompt, win_rate


def summarize(evaluation: Evaluation, base: Evaluation | None = None) -> dict[str, Any]:
    """Return an evaluation's numbers: metrics, bootstrap intervals, and the paired comparison.

    Intervals are over prompts (`stats`). `against_base` has the mean difference and the share of
    images that score better than the base's at the same prompt and seed: higher, or lower for the
    rewards that `lower` names, of which less is better. `tasks` has each task's mean, where the
    prompts' metadata have a task, and `gold` the weight of each gold reward.
    """
    groups = evaluation.groups
    names = evaluation.reported
    summary: dict[str, Any] = {
        "images": len(evaluation.images),
        "prompts": int(groups[-1]) + 1,
        "metrics": {name: number_or_none(value) for name, value in evaluation.metrics().items()},
        "rewards": {
            name: _interval(bootstrap_mean(by_prompt(v, groups))) for name, v in names.items()
        },
    }
    if evaluation.gold:
        summary["gold"] = dict(evaluation.gold)
    if evaluation.lower:
        summary["lower"] = list(evaluation.lower)
    if evaluation.tasks:
        tasks = np.array(evaluation.tasks)
        summary["tasks"] = {
            task: {"images": int((tasks == task).sum())}
            | {
                name: _interval(bootstrap_mean(by_prompt(v[tasks == task], groups[tasks == task])))
                for name, v in names.items()
            }
            for task in sorted(set(evaluation.tasks))
        }
    if base is not None:
        summary["against_base"] = {}
        for name, values in names.items():
            first = base.reported[name]
            pair = (first, values) if name in evaluation.lower else (values, first)
            rate = win_rate(*pair, groups)
            summary["against_base"][name] = {
                "difference": _interval(bootstrap_mean(by_prompt(values - first, groups))),
                "win_rate": rate.value,
                "win_rate_low": rate.low,
                "win_rate_high": rate.high,
            }
    return summary


def _interval(interval: Interval) -> dict[str, float | None]:
    return {
        "mean": number_or_none(interval.value),
        "low": number_or_none(interval.low),
        "high": number_or_none(interval.high),
    }


def number_or_none(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if np.isnan(value) else value


def to_markdown(title: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return summaries as Markdown tables.

    Args:
        title: the heading.
        sections: a name, such as a model's or a sampler's, to a `summarize`d evaluation.
    """
    lines = [f"# {title}", ""]
    said = (
        "Means with 95 % bootstrap intervals over prompts; win rates with Wilson's, also over them."
    )
    lines += [said, ""]
    for name, summary in sections.items():
        lines += [
            f"## {name}",
            "",
            f"{summary['images']} images of {summary['prompts']} prompts.",
            "",
        ]
        against = summary.get("against_base", {})
        head = ["reward", "mean"] + (["difference to the base", "win rate"] if against else [])
        rows = []
        for reward, interval in summary["rewards"].items():
            row = [reward, _text(interval)]
            if against:
                found = against[reward]
                rate = (found["win_rate"], found["win_rate_low"], found["win_rate_high"])
                rate_text = "{:.1%} [{:.1%}, {:.1%}]".format(*rate)
                row += [_text(found["difference"]), rate_text]
            rows.append(row)
        lines += _table(head, rows)
        measured = [
            [name, f"{value:.4g}"]
            for name, value in summary["metrics"].items()
            if value is not None and not name.startswith("reward/")
        ]
        lines += _table(["measure", "mean"], measured)
        tasks = summary.get("tasks", {})
        if tasks:
            rewards = list(summary["rewards"])
            lines += _table(
                ["task", "images", *rewards],
                [
                    [task, str(found["images"]), *(_text(found[reward]) for reward in rewards)]
                    for task, found in tasks.items()
                ],
            )
    return "\n".join(lines)


def _text(interval: Mapping[str, float | None]) -> str:
    if interval["low"] is None:
        return f"{interval['mean']:.4g}"
    return "{mean:.4g} [{low:.4g}, {high:.4g}]".format(**interval)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *escaped)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]
