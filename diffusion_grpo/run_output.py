"""What a run says and leaves behind while it goes; of several processes, the first one does it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo import processes
from diffusion_grpo.config import Config
from diffusion_grpo.evaluate import Evaluation
from diffusion_grpo.events import record_event
from diffusion_grpo.faults import check_present
from diffusion_grpo.gallery import ROLLOUT_TILE, reduced
from diffusion_grpo.grids import image_grid
from diffusion_grpo.images import save_image
from diffusion_grpo.mesh import own_places, own_rows
from diffusion_grpo.metrics import MetricsLog, Progress, read_metrics
from diffusion_grpo.recorder import Recorder
from diffusion_grpo.results import describe, save_evaluation_grid, save_results
from diffusion_grpo.reward_scores import RewardResult
from diffusion_grpo.stats import MONITORS, diversity, monitor

# Images of an iteration that are measured; all of a large one would take seconds.
MEASURED = 32
# Pixels a side that the grid of an iteration's images comes to at most, about: what stands around a
# row takes some of it, and no image is made smaller than in the gallery.
GRID_SIDE, GRID_AROUND = 4096, 48
# A metric of iterations that were evaluated.
EVALUATED = "eval/reward/mean"


def starting(text: str, *, quiet: bool) -> None:
    """Say on stderr what a run does while it has no records yet."""
    if not quiet and processes.leads():
        print(text, file=sys.stderr, flush=True)


class RunOutput:
    """Progress, metrics, pictures and the records of a run; a context that closes them.

    Every process calls the same methods, since images are gathered from all of them and what the
    records decide is told to all.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        log: MetricsLog | None,
        *,
        start: int,
        quiet: bool,
        verbose: bool,
        gold: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare.

        Args:
            config: the run's.
            directory: of the run.
            log: its metrics; None in a process that writes nothing.
            start: iterations done before.
            quiet: show no progress.
            verbose: show every iteration.
            gold: name → weight of the gold rewards.
        """
        self._gold = gold
        self._config, self._directory, self._start = config, directory, start
        self._done = start
        self._log, self._recorder = log, None
        self._last: dict[str, Any] = {}  # the metrics of the last iteration, where it goes on
        if start and log is not None:
            rows = [row for row in read_metrics(log.path) if row["iteration"] == start - 1]
            self._last = {key: value for row in rows for key, value in row.items()}
            self._last.pop("iteration", None)
        self._known = tuple(self._last)  # what trackers have of it
        self._progress = Progress(
            config.run.iterations,
            start=start,
            quiet=quiet or log is None,
            verbose=verbose and log is not None,
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunOutput:
        """Open the records."""
        with contextlib.ExitStack() as stack:
            if self._log is not None:
                stack.enter_context(self._log)
            stack.enter_context(self._progress)
            if self._log is not None:
                recorder = Recorder(
                    self._config,
                    self._directory,
                    start=self._start,
                    evaluated=EVALUATED in self._last,
                    gold=self._gold,
                )
                self._recorder = stack.enter_context(recorder)
            self._stack = stack.pop_all()
        self._record(f"resumed after {self._start} iterations" if self._start else "begun")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """Close them."""
        if kind is None:
            self._record("finished")
        else:
            self._record(f"ended by {kind.__name__}: {error[0]}")
        self._stack.__exit__(kind, *error)

    def _record(self, text: str) -> None:
        if self._recorder is not None:
            record_event(self._directory, self._done, text)

    def message(self, text: str) -> None:
        """Say a line, and record it."""
        self._record(text)
        self._progress.message(text)

    def before(self, evaluation: Evaluation) -> None:
        """Record the evaluation of the untrained model."""
        self.message(describe(evaluation, "before"))
        if self._recorder is not None:
            self._recorder.evaluation(0, evaluation)
            path = self._directory / "samples" / "before.png"
            save_evaluation_grid(evaluation, path, "before training")

    def rollout(
        self,
        iteration: int,
        images: Any,
        texts: Sequence[str],
        result: RewardResult,
        advantages: Any,
    ) -> dict[str, float]:
        """Record the images of an iteration, in the size of the gallery, and measure them.

        Args:
            iteration: counted from 0.
            images: uint8 [B, H, W, 3], divided over the devices.
            texts: B prompts.
            result: their scores.
            advantages: [B].

        Returns:
            What `stats` measures: the diversity of the groups, of the gallery's tiles, and the
            means over `MEASURED` of the images, evenly from all; nothing in a process that writes
            nothing.
        """
        if self._recorder is not None:
            check_present(self._directory)
        own = np.asarray(own_rows(images))
        # The same images, however many processes there are.
        some = np.unique(np.linspace(0, len(images) - 1, MEASURED, dtype=int))
        places = own_places(len(images))
        here = some[(places.start <= some) & (some < places.stop)] - places.start
        found = np.zeros((len(own), len(MONITORS)), np.float32)
        if len(here):
            found[here] = np.stack(list(monitor(own[here]).values()), axis=1)
        tiles = reduced(own, ROLLOUT_TILE)
        if processes.count() > 1:
            tiles = processes.gather_rows(tiles, "the gallery's images")
            found = processes.gather_rows(found, "what was measured of the images")
        if self._recorder is None:
            return {}
        found = found[some]
        size = self._config.rollout.images_per_prompt
        self._recorder.rollout(
            iteration,
            tiles,
            texts,
            {"total": result.total} | result.scores,
            np.asarray(advantages),
            size,
        )
        measured = dict(zip(MONITORS, found.mean(axis=0).tolist(), strict=True))
        groups = np.arange(len(tiles)) // size
        return measured | {"diversity": float(diversity(tiles, groups).mean())}

    def evaluation(
        self, done: int, evaluation: Evaluation, metrics: dict[str, Any], since: float
    ) -> tuple[str | None, float | None]:
        """Record an evaluation after `done` iterations.

        Args:
            done: how many.
            evaluation: what it came to.
            metrics: of the iteration, to which it adds its own.
            since: `perf_counter` when it was begun.

        Returns:
            Why to stop the run, or None; and the mean that makes it the best so far, or None.
        """
        self.message(describe(evaluation, f"iteration {done}"))
        quality = None
        if self._recorder is not None:
            metrics |= {f"eval/{name}": value for name, value in evaluation.metrics().items()}
            metrics["time/evaluate"] = time.perf_counter() - since
            self._recorder.evaluation(done, evaluation)
            if self._config.eval.keep_best and self._recorder.is_best(done):
                quality = self._recorder.quality(done)
        return self.stop_reason(), processes.of_leader(quality, "whether it is the best so far")

    def stop_reason(self) -> str | None:
        """Return why the evaluations so far should end the run early, or None."""
        reason = None if self._recorder is None else self._recorder.stop_reason()
        return processes.of_leader(reason, "whether to stop early")

    def unevaluated(self) -> dict[str, Any] | None:
        """Return the metrics of a resumed run's last iteration, to which an evaluation belongs.

        None if they have it. A run was stopped within it, or had its end there and was made longer.
        """
        found = None if EVALUATED in self._last else self._last
        return processes.of_leader(found, "what was not evaluated")

    def metrics(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of an iteration, in the place of what was written of it before."""
        if self._log is not None and self._recorder is not None:
            again = iteration < self._start
            if again:
                self._log.truncate_after(iteration - 1)
            self._log.write(iteration, metrics)
            self._recorder.metrics(iteration, metrics, known=self._known if again else ())

    def samples(self, done: int, images: Any, prompts: Sequence[str], mean: float) -> None:
        """Write the grid of an iteration's images, group by group, reduced to about `GRID_SIDE`.

        Args:
            done: iterations.
            images: uint8 [B, H, W, 3], divided over the devices.
            prompts: P texts.
            mean: of their rewards.
        """
        drawn = processes.gather_rows(np.asarray(own_rows(images)), "the images of a grid")
        if self._recorder is None:
            return
        columns = self._config.rollout.images_per_prompt
        title = f"iteration {done}: reward {mean:.4f}"
        longest = max(ROLLOUT_TILE, GRID_SIDE // max(columns, len(prompts)) - GRID_AROUND)
        grid = image_grid(drawn, prompts, columns=columns, title=title, max_size=longest)
        save_image(self._directory / "samples" / f"iteration_{done:05d}.png", grid)

    def update(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Show that iterations are done."""
        self._done = done
        self._progress.update(done, metrics)

    def after(self, done: int, before: Evaluation, after: Evaluation) -> None:
        """Record the last evaluation, and write what the run came to."""
        self.message(describe(after, "after"))
        if self._recorder is not None:
            self._recorder.evaluation(done, after, last=True)
            save_results(self._config, self._directory, before, after)

    def settle(self, done: int) -> None:
        """Say which model is the best."""
        if self._recorder is not None:
            self.message(self._recorder.settle_best(done))
