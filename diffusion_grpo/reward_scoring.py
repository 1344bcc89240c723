"""Several rewards beside each other, and beside the sampler that draws their images."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from diffusion_grpo.errors import RewardError, UsageError
from diffusion_grpo.images import to_uint8
from diffusion_grpo.reward_run import Batch, RewardRun
from diffusion_grpo.reward_scores import Combination, RewardResult, combine


class Scoring:
    """Scores the images of one batch as they come from the sampler.

    `add` takes the next images and returns at once: each host reward works on them in a thread of
    its own while the next ones are being drawn. Rewards on the device, which would only stand in
    the sampler's way, run in `result`, over all images.
    """

    def __init__(
        self,
        runs: Sequence[RewardRun],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        *,
        weights: Mapping[str, float],
        combination: Combination = "weighted",
        pessimism: float = 1.0,
        group_size: int | None = None,
        max_dropped: float = 0.0,
        order: np.ndarray | None = None,
    ) -> None:
        """Prepare for `len(prompts)` images.

        Args:
            runs: the rewards.
            prompts: B texts, those of a group side by side.
            metadata: B dictionaries.
            weights: reward name to its weight.
            combination: as in `combine`.
            pessimism: as in `combine`.
            group_size: G; None if the images have no groups: then none can be dropped.
            max_dropped: the largest share of groups that may be dropped.
            order: `[B]`, the places of the images in the order in which they will come; None for
                that of the prompts. In another order, rewards of a group wait for all images.

        Raises:
            ValueError: the counts differ, or B is no multiple of G.
            UsageError: a reward compares the images of a group, and there are no groups.
        """
        count = len(prompts)
        if len(metadata) != count:
            raise ValueError(
                f"{count} prompts and {len(metadata)} metadata: expected the same number of each"
            )
        if group_size is not None and count % group_size:
            raise ValueError(f"{count} images are no whole number of groups of {group_size}")
        for run in runs:
            if run.reward.of_group and (group_size is None or group_size < 2):
                raise UsageError(
                    f"reward {run.reward.name!r} compares the images of a group, but "
                    f"{'images have no groups here' if group_size is None else 'a group has 1'}; "
                    "expected groups of 2 or more"
                )
        self._order = np.arange(count) if order is None else np.asarray(order)
        self._in_order = bool((self._order == np.arange(count)).all())
        self._runs = list(runs)
        places: list[int] = self._order.tolist()
        self._prompts = [prompts[place] for place in places]
        self._metadata = [metadata[place] for place in places]
        self._combine = (dict(weights), combination, pessimism)
        self._group_size, self._max_dropped = group_size, max_dropped
        self._parts: list[_Part] = []
        self._seen = 0
        self._workers = {
            run.reward.name: _Worker(run) for run in self._runs if not self._waits(run)
        }

    def __enter__(self) -> Scoring:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the threads; what they have not begun is left undone."""
        for worker in self._workers.values():
            worker.stop()

    def add(self, images: Any) -> None:
        """Take the next images.

        Args:
            images: [b, H, W, 3], NumPy or JAX; uint8, or floating in [0, 1], which is clipped and
                rounded to multiples of 1/255 once, so that all rewards judge the same picture.

        Raises:
            ValueError: another shape or type, not finite, or more images than prompts.
            RewardError: a reward has failed on earlier images.
        """
        part = _Part(quantize(images))
        if self._seen + len(part) > len(self._prompts):
            raise ValueError(
                f"{self._seen + len(part)} images and {len(self._prompts)} prompts: expected the "
                "same number of each"
            )
        self._parts.append(part)
        before, self._seen = self._seen, self._seen + len(part)
        for run in self._runs:
            if self._waits(run):
                continue
            worker = self._workers[run.reward.name]
            worker.raise_failure()
            whole = self._group_size if run.reward.of_group and self._group_size else 1
            start, stop = before // whole * whole, self._seen // whole * whole
            if stop > start:
                worker.submit(partial(self._batch, start, stop, on_host=True))

    def result(self) -> RewardResult:
        """Wait for the host rewards, run those on the device, and combine.

        Raises:
            ValueError: there were fewer images than prompts.
            RewardError: a reward failed, or more groups than `max_dropped` were dropped.
        """
        count = len(self._prompts)
        if self._seen != count:
            raise ValueError(
                f"{self._seen} images and {count} prompts: expected the same number of each"
            )
        found: dict[str, list[np.ndarray]] = {}
        places = np.argsort(self._order)
        for run in self._runs:
            if self._waits(run):
                found[run.reward.name] = self._late(run, places) if count else []
        for name, worker in self._workers.items():
            found[name] = worker.results()
        scores = {
            run.reward.name: np.concatenate(found[run.reward.name] or [np.zeros(0, np.float32)])[
                places
            ]
            for run in self._runs
        }
        weights, combination, pessimism = self._combine
        kept = self._kept(scores)
        total = combine(scores, weights, combination, pessimism=pessimism)
        return RewardResult(
            scores,
            np.where(kept, total, np.float32(np.nan)),
            {run.reward.name: run.seconds for run in self._runs},
            weights,
            kept,
            {r.reward.name: r.hits / max(count, 1) for r in self._runs if r.cache is not None},
            tuple(note for run in self._runs for note in run.notes),
        )

    def _waits(self, run: RewardRun) -> bool:
        """Whether a reward runs once all images are there."""
        return run.reward.on_device or (run.reward.of_group and not self._in_order)

    def _late(self, run: RewardRun, places: np.ndarray) -> list[np.ndarray]:
        """Run a reward on all images; returns the scores in the order in which they came."""
        count, starts = len(places), np.cumsum([0, *map(len, self._parts)])
        if self._in_order:
            return [run(self._batch(0, count))]
        if run.reward.of_group:  # groups lie side by side in the order of the prompts
            whole = self._batch(0, count, on_host=not run.reward.on_device)
            return [run(whole.take(places.tolist()))[self._order]]
        # A part lies on the devices as it was drawn: joined with others it would be moved.
        return [
            run(self._batch(int(a), int(b))) for a, b in zip(starts[:-1], starts[1:], strict=True)
        ]

    def _batch(self, start: int, stop: int, *, on_host: bool = False) -> Batch:
        """Return the images that came as `start` to `stop`."""
        pixels, first = [], 0
        for part in self._parts:
            rows = slice(max(start - first, 0), max(min(stop - first, len(part)), 0))
            if rows.start < rows.stop:
                whole = part.on_host() if on_host else part.pixels
                pixels.append(whole if rows == slice(0, len(part)) else whole[rows])
            first += len(part)
        size = self._group_size
        return Batch(
            _concatenate(pixels),
            self._prompts[start:stop],
            self._metadata[start:stop],
            self._order[start:stop].tolist(),
            None if size is None else (self._order[start:stop] // size).tolist(),
        )

    def _kept(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return which images are in a group that every reward has scored.

        Raises:
            RewardError: too few.
        """
        missing = np.any([np.isnan(values) for values in scores.values()], axis=0)
        if self._group_size is None or not missing.any():
            return ~missing
        groups = missing.reshape(-1, self._group_size).any(axis=1)
        notes = [note for run in self._runs for note in run.notes]
        check_dropped(missing, self._group_size, self._max_dropped, notes)
        return ~groups.repeat(self._group_size)


def check_dropped(
    missing: np.ndarray, group_size: int, max_dropped: float, notes: Sequence[str]
) -> None:
    """Raise a `RewardError` if the groups with a missing score are more than a share of all.

    Args:
        missing: `[B]`.
        group_size: G.
        max_dropped: the largest share.
        notes: what was dropped, and why; the last one is told.
    """
    groups = np.any(missing.reshape(-1, group_size), axis=1)
    if groups.mean() > max_dropped:
        raise RewardError(
            f"{groups.sum()} of {len(groups)} groups were dropped, more than the share of "
            f"reward.max_dropped = {max_dropped:g}; the last: {notes[-1]}"
        )


class _Part:
    """Some images, fetched to the host at most once, by whichever reward needs them first."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels
        self._host: np.ndarray | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.pixels)

    def on_host(self) -> np.ndarray:
        with self._lock:
            if self._host is None:
                self._host = np.asarray(self.pixels)
            return self._host


class _Worker:
    """A thread that runs one reward over batches, in order. It dies with the process."""

    def __init__(self, run: RewardRun) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], Batch] | None] = queue.SimpleQueue()
        self._results: list[np.ndarray] = []
        self._failure: Exception | None = None
        self._stopped = False
        self._thread = threading.Thread(
            target=self._work, args=(run,), name=f"reward-{run.reward.name}", daemon=True
        )
        self._thread.start()

    def _work(self, run: RewardRun) -> None:
        while (task := self._tasks.get()) is not None and not self._stopped:
            try:
                self._results.append(run(task()))
            except Exception as error:
                self._failure = error
                return

    def submit(self, task: Callable[[], Batch]) -> None:
        self._tasks.put(task)

    def stop(self) -> None:
        self._stopped = True
        self._tasks.put(None)

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def results(self) -> list[np.ndarray]:
        self._tasks.put(None)
        self._thread.join()
        self.raise_failure()
        return self._results


def _concatenate(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    import jax.numpy as jnp

    return jnp.concatenate(parts)


def quantize(images: Any) -> Any:
    """Check images and bring them to uint8, where they are: NumPy stays NumPy, JAX stays JAX.

    Raises:
        ValueError: another shape or type, or not finite.
    """
    if getattr(images, "ndim", None) != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images have shape {getattr(images, 'shape', None)}, expected [B, H, W, 3]"
        )
    if images.dtype == np.uint8:
        return images
    if isinstance(images, np.ndarray):
        return to_uint8(images)
    import jax.numpy as jnp

    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}, expected uint8 or floating in [0, 1]")
    images = images.astype(jnp.float32)
    finite = np.asarray(jnp.isfinite(images).all(axis=(1, 2, 3)))
    if not finite.all():
        raise ValueError(
            f"image {int(np.argmin(finite))} holds NaN or infinity: has the model diverged?"
        )
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
