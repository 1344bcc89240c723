"""What a run measures: `metrics.jsonl`, one JSON object a line, and the progress shown meanwhile.

Every line has `iteration` and any of these; a name with `eval/` before it is the same over an
evaluation: all its images, of the held-out prompts, or of the training list if none is held out.

| name | unit | meaning |
|---|---|---|
| `reward/mean`, `reward/std` | reward | combined total over the images; population std |
| `reward/group_std` | reward | std of the total within a group, mean over the groups |
| `reward/<name>/mean`, `/std`, `/min`, `/max` | its own | one reward, unweighted |
| `reward/correlation/<a>:<b>` | 1 | Pearson's, of two rewards; left out where one is constant |
| `reward/dropped` | share | images left out with their groups, since a reward failed; if any |
| `reward/<name>/dropped`, `/cached` | share | images it failed on, if any; whose score it knew |
| `advantage/mean`, `advantage/std` | 1 | advantages after clipping |
| `advantage/zero_groups` | share | groups whose advantages are all 0, which teach nothing |
| `loss` | 1 | what is minimized: policy loss + β · KL − entropy term, mean over updates |
| `policy_loss` | 1 | the clipped surrogate alone |
| `kl` | nats* | KL(π_θ ‖ π_ref) of the steps learned from; for `nft` mean square of outputs' gap |
| `beta` | 1 | β, the weight of the KL, which a target KL adapts |
| `approx_kl` | nats* | KL(π_old ‖ π_θ) by k3: of a trajectory, or of a step, as `ratio` says † |
| `ratio/mean`, `ratio/min`, `ratio/max` | 1 | ρ = π_θ / π_old, or / π_ref by `ratio_base` † |
| `ratio/drift` | nats* | largest change of a step's log p at θ_old: of rounding alone |
| `clip_fraction` | share | ratios clipped, so without gradient † |
| `entropy` | nats* | of the steps that are learned from, summed |
| `noise_scale/min`, `noise_scale/max` | 1 | learned factor of the steps' noise |
| `old_distance` | output² | for `nft`: mean square difference of the outputs to the old policy |
| `grad_norm` | 1 | global gradient norm before clipping |
| `skipped` | updates | left out because their loss or gradient was not finite |
| `learning_rate` | 1 | of the last update |
| `time/sample`, `time/update`, `time/iteration` | s | wall time |
| `time/reward` | s | wall time of the rewards after the last image is drawn |
| `time/reward/<name>` | s | wall time of one reward; on the host mostly while images are drawn |
| `images_per_second` | 1/s | images of the iteration by its wall time |
| `eval/reward/mean`, `eval/reward/standard_error` | reward | an evaluation's total, and error |
| `eval/reward/<name>/mean` | its own | one reward of an evaluation, trained on or gold |
| `diversity` | share | difference of a prompt's images, 0 to 1; with `eval/` if it has several |
| `sharpness` | level | spread of the Laplacian; blur lowers it, grids raise it; of 32 images ‡ |
| `saturation` | share | mean saturation of the colors; of 32 images ‡ |
| `brightness` | level | mean luma; of 32 images ‡ |
| `jpeg_kilobytes` | kB | size as a JPEG of quality 95; of 32 images ‡ |
| `eval/kl` | nats* | of an evaluation: KL to the reference over stochastic trajectories |
| `time/evaluate` | s | wall time of an evaluation |

* by `log_prob_reduction`: a sum over the latent's elements, or their mean.

† of several updates a rollout, means are over those after the first, at which ρ is 1.

‡ evenly from those of the iteration; with `eval/` of all.

JSON has no NaN and no infinity: they are written as the strings `"nan"`, `"inf"` and `"-inf"`, and
`read_metrics` turns them back into numbers.
"""

from __future__ import annotations

import errno
import json
import math
import numbers
import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError

METRICS_FILE = "metrics.jsonl"

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def metric_meanings() -> dict[str, str]:
    """Return name → unit and meaning of every metric, from the table above.

    A name may have a placeholder, `reward/<name>/mean`, and `eval/` before it, of an evaluation.
    """
    meanings = {}
    for line in (__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 3 or not cells[0].startswith("`"):
            continue
        names = re.findall(r"`([^`]+)`", cells[0])
        for name in names:  # `reward/<name>/mean`, `/std`: the last part alone stands for the rest
            full = names[0].rpartition("/")[0] + name if name.startswith("/") else name
            meanings[full] = f"{cells[2]} ({cells[1]})"
    return meanings


def to_number(name: str, value: Any) -> int | float:
    """Convert a scalar of any library to a Python number.

    Args:
        name: the metric, for messages.
        value: a number, or an array of shape ().

    Returns:
        An `int` where it is a whole number type, else a `float`.

    Raises:
        TypeError: not a number, or not a scalar.
    """
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    array = np.asarray(value)
    if array.shape == () and np.can_cast(array.dtype, np.float64):
        return int(array) if array.dtype.kind in "iub" else float(array)
    raise TypeError(
        f"metric {name!r} is {type(value).__name__} of shape {array.shape} and dtype "
        f"{array.dtype}; expected one number"
    )


class MetricsLog:
    """Appends metrics to `metrics.jsonl` in a run directory, a line at a time.

    Every line is flushed as it is written, so that a run that is killed loses none. A last line
    that a kill cut short is dropped when the file is opened again.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Open the log.

        Args:
            run_dir: an existing directory.

        Raises:
            UsageError: the directory does not exist, or the file holds a broken line or cannot be
                written.
        """
        self.path = Path(run_dir) / METRICS_FILE
        if not self.path.parent.is_dir():
            raise UsageError(f"run directory {str(run_dir)!r} does not exist: create it first")
        try:
            if self.path.is_file():
                _rewrite(self.path, read_metrics(self.path))
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}); expected a file of this run: "
                "mend its permissions, or move it away"
            ) from None

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            iteration: counted from 0; several lines may share one.
            metrics: name to a scalar of any library.

        Raises:
            TypeError: a value that is not one number.
            ValueError: a metric named `iteration`, or the log is closed.
            OSError: the file cannot be written, or was removed.
        """
        if "iteration" in metrics:
            raise ValueError("a metric must not be named 'iteration': it is the line's own number")
        if not self.path.is_file():
            raise FileNotFoundError(errno.ENOENT, "it was removed during the run", str(self.path))
        row = {name: to_number(name, value) for name, value in metrics.items()}
        self._file.write(_encode({"iteration": int(iteration), **row}))
        self._file.flush()

    def truncate_after(self, iteration: int) -> None:
        """Forget what came after an iteration, before resuming from its checkpoint.

        Args:
            iteration: the last one to keep; -1 forgets everything.
        """
        self._file.close()
        kept = [row for row in read_metrics(self.path) if row["iteration"] <= iteration]
        _rewrite(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        """Return the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file, or that of a run directory.

    Args:
        path: `metrics.jsonl`, or the directory that holds it.

    Returns:
        One dictionary a line, in the order written. A last line that was cut short is left out.

    Raises:
        UsageError: there is no such file, or a line other than the last is broken (its number is
            in the message).
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"no metrics file at {str(path)!r}: expected a run directory's {METRICS_FILE}"
        )
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
                raise ValueError("not an object with an iteration")
        except ValueError as error:  # broken JSON and broken UTF-8 are ValueErrors too
            if number == len(lines):  # no newline after it: the process died while writing
                break
            raise UsageError(
                f"{path}, line {number} is broken: {error}; mend or delete the line"
            ) from error
        rows.append({k: _SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def _encode(row: Mapping[str, Any]) -> str:
    safe = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(safe, allow_nan=False, ensure_ascii=False) + "\n"


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    # Through a second file, so that a kill in between leaves the old one whole.
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text("".join(map(_encode, rows)), encoding="utf-8")
    os.replace(scratch, path)


class Progress:
    """Shows how a run goes: a bar on a terminal, a line now and then anywhere else.

    Iteration, mean reward, KL, images per second and time left. The time left is the median time of
    the last iterations times the number that remain, so that the compilation in the first one does
    not spoil it.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        interval: float = 10.0,
        quiet: bool = False,
        verbose: bool = False,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is shown before the context is entered.

        Args:
            total: iterations of the whole run.
            start: iterations done before, when it is resumed.
            interval: seconds between two lines where there is no terminal.
            quiet: show nothing.
            verbose: write a line every iteration, also on a terminal.
            stream: the text stream to write to; standard error by default.
            clock: seconds, monotonic.
        """
        self.total = total
        self.done = start
        self._interval = 0.0 if verbose else interval
        self._quiet, self._verbose = quiet, verbose
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._last_update = self._last_line = clock()
        self._durations: deque[float] = deque(maxlen=20)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        """Show the bar, if the stream is a terminal."""
        self._last_update = self._clock()
        self._last_line = -math.inf
        if self._stream.isatty() and not self._quiet:
            from rich import progress as rich_progress
            from rich.console import Console

            self._bar = rich_progress.Progress(
                rich_progress.SpinnerColumn(),
                rich_progress.TextColumn("iteration {task.completed}/{task.total}"),
                rich_progress.BarColumn(bar_width=24),
                rich_progress.TextColumn("{task.fields[summary]}"),
                rich_progress.TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "train",
                total=self.total,
                completed=self.done,
                summary="compiling the first iteration",
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Show that iterations are done.

        Args:
            done: how many, of the whole run.
            metrics: those of the last one; `reward/mean`, `kl` and `images_per_second` are shown.
        """
        now = self._clock()
        if done > self.done:
            self._durations.append((now - self._last_update) / (done - self.done))
            self._last_update = now
        self.done = done
        summary = self.summary(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, summary=summary)
        if self._bar is not None and not self._verbose:
            return
        if now - self._last_line >= self._interval or done >= self.total:
            self._last_line = now
            self.message(f"iteration {done}/{self.total}  {summary}")

    def message(self, text: str) -> None:
        """Write a line, above the bar if there is one.

        Args:
            text: written as it is: neither markup nor a name of an emoji is replaced.
        """
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, emoji=False)
        else:
            print(text, file=self._stream, flush=True)

    def seconds_left(self) -> float | None:
        """Return the seconds left by the last iterations' median, or None before the first."""
        if not self._durations:
            return None
        return statistics.median(self._durations) * max(0, self.total - self.done)

    def summary(self, metrics: Mapping[str, Any]) -> str:
        """Return a line's text: reward, KL, images per second, time left.

        Args:
            metrics: those that it lacks are left out.

        Returns:
            For example `reward 0.2710  KL 1.20e-03  3.4 images/s  0:12:03 left`.
        """
        parts = []
        if "reward/mean" in metrics:
            parts.append(f"reward {to_number('reward/mean', metrics['reward/mean']):.4f}")
        if "kl" in metrics:
            parts.append(f"KL {to_number('kl', metrics['kl']):.2e}")
        if "images_per_second" in metrics:
            speed = to_number("images_per_second", metrics["images_per_second"])
            parts.append(f"{speed:.3g} images/s")
        left = self.seconds_left()
        if left is not None:
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return "  ".join(parts)
