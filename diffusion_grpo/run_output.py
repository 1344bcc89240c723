"""What a run says and leaves behind while it goes; of several processes, the first one does it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo import processes
from diffusion_grpo.config import Config
from diffusion_grpo.evaluate import Evaluation
from diffusion_grpo.faults import check_present
from diffusion_grpo.gallery import ROLLOUT_TILE, reduced
from diffusion_grpo.grids import image_grid
from diffusion_grpo.images import save_image
from diffusion_grpo.mesh import own_rows
from diffusion_grpo.metrics import MetricsLog, Progress
from diffusion_grpo.recorder import Recorder
from diffusion_grpo.results import describe, save_evaluation_grid, save_results
from diffusion_grpo.reward_scores import RewardResult


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
        self._log, self._recorder = log, None
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
                    self._config, self._directory, start=self._start, gold=self._gold
                )
                self._recorder = stack.enter_context(recorder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Close them."""
        self._stack.__exit__(*error)

    def message(self, text: str) -> None:
        """Say a line."""
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
    ) -> None:
        """Record the images of an iteration, in the size of the gallery.

        Args:
            iteration: counted from 0.
            images: uint8 [B, H, W, 3], divided over the devices.
            texts: B prompts.
            result: their scores.
            advantages: [B].
        """
        if self._recorder is not None:
            check_present(self._directory)
        tiles = np.asarray(own_rows(images))
        if processes.count() > 1:
            tiles = processes.gather_rows(reduced(tiles, ROLLOUT_TILE), "the gallery's images")
        if self._recorder is not None:
            self._recorder.rollout(
                iteration,
                tiles,
                texts,
                {"total": result.total} | result.scores,
                np.asarray(advantages),
                self._config.rollout.images_per_prompt,
            )

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
        stopped = quality = None
        if self._recorder is not None:
            metrics |= {f"eval/{name}": value for name, value in evaluation.metrics().items()}
            metrics["time/evaluate"] = time.perf_counter() - since
            self._recorder.evaluation(done, evaluation)
            stopped = self._recorder.stop_reason()
            if self._config.eval.keep_best and self._recorder.is_best(done):
                quality = self._recorder.quality(done)
        stopped, quality = processes.of_leader([stopped, quality], "whether to stop early")
        return stopped, quality

    def metrics(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of an iteration."""
        if self._log is not None and self._recorder is not None:
            self._log.write(iteration, metrics)
            self._recorder.metrics(iteration, metrics)

    def samples(self, done: int, images: Any, prompts: Sequence[str], mean: float) -> None:
        """Write the grid of an iteration's images, group by group.

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
        grid = image_grid(drawn, prompts, columns=columns, title=title)
        save_image(self._directory / "samples" / f"iteration_{done:05d}.png", grid)

    def update(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Show that iterations are done."""
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
