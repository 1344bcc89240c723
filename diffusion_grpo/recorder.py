"""What a run records for people as it goes: gallery, trackers, the report, the best model."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo.config import Config
from diffusion_grpo.errors import Preempted, RunError, UsageError
from diffusion_grpo.evaluate import Evaluation
from diffusion_grpo.evaluation_summary import summarize
from diffusion_grpo.gallery import Entry, Gallery, contact_sheet
from diffusion_grpo.output_files import write_whole
from diffusion_grpo.prompts import evaluated_on
from diffusion_grpo.report import EARLY_STOP_FILE, write_report
from diffusion_grpo.trackers import make_trackers

REPORT_SECONDS = 60.0  # the least time between two reports

# What `best.json` says where neither best/ nor final/ is the best model.
UNTRAINED = "the untrained model"
NOT_KEPT = "not kept (eval.keep_best is False)"
LOST = "not kept (the run ended with a better one, and was made longer)"


class Recorder:
    """Records a run; a context that closes the trackers and writes the last report.

    A run that is preempted has little time, and is resumed: its report is left as it is.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        *,
        start: int = 0,
        evaluated: bool = True,
        gold: Mapping[str, float] | None = None,
    ) -> None:
        """Open the records of a run, and forget what came after `start` iterations.

        Args:
            config: the run's.
            directory: of the run.
            start: iterations done before.
            evaluated: whether the evaluation after them was one within the run, and finished; that
                of a shorter run's end is forgotten.
            gold: name → weight of the gold rewards, as they are in the evaluations' scores.

        Raises:
            UsageError: a tracker that is asked for is not installed.
        """
        self.gallery = Gallery(directory)
        known = [entry.iteration for entry in self.gallery.entries("evaluation")]
        # What trackers have already of a run that goes on: its first evaluation and, where that
        # is done anew, the one that it went on after.
        self._told = {0, start}.intersection(known) if start else set()
        self.gallery.truncate_after(start, evaluated=evaluated)
        (directory / EARLY_STOP_FILE).unlink(missing_ok=True)
        self._directory = directory
        self._prompts = evaluated_on(config.prompts.heldout, config.prompts.heldout_share)
        self._gold = dict(gold or {})
        self._patience, self._keep_best = config.eval.patience, config.eval.keep_best
        self._trackers = make_trackers(config, directory, start=start)
        self._report = config.run.report
        self._report_due = -math.inf
        self._before: Evaluation | None = None

    def __enter__(self) -> Recorder:
        """Return the recorder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the trackers, and write the report once more."""
        for tracker in self._trackers:
            tracker.close()
        if kind is not None and issubclass(kind, Preempted):
            return
        # What ended the run may be what the report cannot be written for; it is told, not this.
        with contextlib.suppress(*(() if kind is None else (RunError,))):
            self.report(now=True)

    def rollout(
        self,
        iteration: int,
        images: np.ndarray,
        prompts: Sequence[str],
        scores: Mapping[str, np.ndarray],
        advantages: np.ndarray,
        group: int,
    ) -> None:
        """Record the images of an iteration.

        Args:
            iteration: counted from 0.
            images: uint8 [B, H, W, 3].
            prompts: B texts.
            scores: `total` and each reward, [B].
            advantages: [B], or one a step, which are averaged.
            group: G.
        """
        each = np.asarray(advantages).reshape(len(images), -1).mean(axis=1)
        self.gallery.add(
            "rollout", iteration, images, prompts, scores, advantages=each, group=group
        )
        for tracker in self._trackers:
            for name, values in scores.items():
                label = "reward" if name == "total" else f"reward/{name}"
                finite = values[np.isfinite(values)]
                if finite.size:
                    tracker.histogram(iteration + 1, f"{label}/distribution", finite)

    def metrics(
        self, iteration: int, metrics: Mapping[str, Any], *, known: Collection[str] = ()
    ) -> None:
        """Hand an iteration's metrics to the trackers, and refresh the report now and then.

        Args:
            iteration: counted from 0.
            metrics: its own, and those of the evaluation after it.
            known: which of them the trackers have already.
        """
        again = iteration + 1 in self._told
        new = {
            name: value
            for name, value in metrics.items()
            if name not in known and not (again and name.startswith("eval/"))
        }
        for tracker in self._trackers if new else ():
            tracker.scalars(iteration + 1, new)
        self.report()

    def evaluation(
        self, done: int, evaluation: Evaluation, *, last: bool = False
    ) -> dict[str, Any]:
        """Record an evaluation after `done` iterations; 0 is the untrained model.

        Args:
            done: how many.
            evaluation: what it came to.
            last: after the last iteration. It goes to the trackers here, as the first does; the
                numbers of others go with the metrics of their iteration. What is there already of a
                run that is resumed does not go there again.

        Returns:
            Its summary: metrics, intervals and, after the first, the comparison with that one.
        """
        if done == 0:
            self._before = evaluation
        summary = summarize(evaluation, self._before if done else None)
        known = [entry.iteration for entry in self.gallery.entries("evaluation")]
        if done or 0 not in known:  # a resumed run has its untrained model on record
            self.gallery.add(
                "evaluation",
                done,
                evaluation.images,
                evaluation.prompts,
                {"total": evaluation.total} | evaluation.scores,
                tasks=evaluation.tasks,
                group=evaluation.images_per_prompt,
                summary=summary,
            )
        sheet = contact_sheet(evaluation.images[:64], 256)[0]
        for tracker in () if done in self._told else self._trackers:
            tracker.picture(done, "eval/images", sheet)
            if last or not done:
                metrics = evaluation.metrics()
                tracker.scalars(done, {f"eval/{name}": value for name, value in metrics.items()})
        self.report()
        return summary

    def quality(self, done: int) -> float:
        """Return the mean that `is_best` compares, of the evaluation after `done` iterations."""
        return {entry.iteration: self._quality(entry) for entry in self._evaluations()}[done]

    def is_best(self, done: int) -> bool:
        """Whether the evaluation after `done` iterations has the highest mean so far.

        By the gold rewards' weighted mean if there are any, and by the total that is trained on
        otherwise.
        """
        means = {entry.iteration: self._quality(entry) for entry in self._evaluations()}
        return done > 0 and means[done] >= max(means.values())

    def settle_best(self, done: int) -> str:
        """Write `best.json`, and drop `best/` where the final model is the best one.

        Returns:
            One line that says which model is the best, and where it is.
        """
        means = {entry.iteration: self._quality(entry) for entry in self._evaluations()}
        best = max(means, key=lambda iteration: (means[iteration], iteration))
        where = {0: UNTRAINED, done: "final/"}.get(best, "best/")
        folder = self._directory / "best"
        if where != "best/" and folder.is_dir():
            shutil.rmtree(folder)
        if where == "best/" and not folder.is_dir():
            where = LOST if self._keep_best else NOT_KEPT
        found = {"iterations": best, "mean": means[best], "by": list(self._gold) or ["total"]}
        text = json.dumps(found | {"model": where}, indent=2)
        write_whole(self._directory / "best.json", text + "\n")
        what = {"held-out": "held-out mean", "training": "mean over the training prompts"}
        mean = f"{what[self._prompts]} {means[best]:.4f}"
        return f"best {mean} after {best} iterations: {where}"

    def stop_reason(self) -> str | None:
        """Return why the run should stop, or None: `early_stop_reason` of the evaluations."""
        history = [
            (entry.iteration, self._mean(entry, "total"), self._quality(entry))
            for entry in self._evaluations()
        ]
        reason = early_stop_reason(history, self._patience) if self._gold else None
        if reason is not None:
            text = json.dumps({"iterations": history[-1][0], "reason": reason}, indent=2)
            write_whole(self._directory / EARLY_STOP_FILE, text + "\n")
        return reason

    def _evaluations(self) -> list[Entry]:
        return self.gallery.entries("evaluation")

    def _quality(self, entry: Entry) -> float:
        weights = self._gold or {"total": 1.0}
        total = sum(weight * self._mean(entry, name) for name, weight in weights.items())
        return total / sum(map(abs, weights.values()))

    def _mean(self, entry: Entry, name: str) -> float:
        return float(np.nanmean(entry.numbers(name)))

    def report(self, *, now: bool = False) -> None:
        """Refresh `report.html`, now and then unless it has to be `now`.

        At most once a minute, and so seldom that it takes no more than a fiftieth of the time.

        Raises:
            RunError: it cannot be written.
        """
        began = time.monotonic()
        if self._report and (now or began >= self._report_due):
            try:
                write_report(self._directory)
            except UsageError as error:
                raise RunError(str(error)) from error
            ended = time.monotonic()
            self._report_due = ended + max(REPORT_SECONDS, 50 * (ended - began))


def early_stop_reason(history: Sequence[tuple[int, float, float]], patience: int) -> str | None:
    """Return why to stop a run whose reward is being hacked, or None.

    Args:
        history: (iterations done, mean of what is trained on, mean of gold), in order.
        patience: how many evaluations in a row, the last included, have to show gold below its best
            and the trained reward above what it was at that best; 0 never stops.
    """
    if not patience or len(history) <= patience:
        return None
    best = max(range(len(history)), key=lambda i: history[i][2])
    after = history[best + 1 :]
    done, reward, gold = history[best]
    worse = [later[2] < gold and later[1] > reward for later in after]
    if len(worse) < patience or not all(worse[-patience:]):
        return None
    return (
        f"stopped after {history[-1][0]} iterations: in {patience} evaluations in a row the gold "
        f"reward was below its best, {gold:.4g} after {done} iterations (now {history[-1][2]:.4g}),"
        f" while the trained reward rose from {reward:.4g} to {history[-1][1]:.4g}"
    )
