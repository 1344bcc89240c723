"""How one reward is run over images: in batches or groups, cached, again or not at all on failure.

Everything here is about a single reward; `reward_scoring` runs several beside each other.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_grpo.errors import RewardError, UsageError
from diffusion_grpo.reward_failure import FailurePolicy
from diffusion_grpo.reward_loading import LoadedReward, describe_error, source_file
from diffusion_grpo.reward_scores import validate_scores

BACKOFF_SECONDS = 0.5  # before the first repeated call; doubled for each further one
MAX_BACKOFF_SECONDS = 30.0


class ScoreCache:
    """Scores by content: of images with the same pixels, prompt and metadata.

    The least recently used scores are forgotten past `capacity`.
    """

    def __init__(self, capacity: int = 200_000) -> None:
        """Start empty; `capacity` is in scores, of about 200 bytes each."""
        self.capacity = capacity
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    @staticmethod
    def key(pixels: np.ndarray, prompt: str, metadata: Mapping[str, Any]) -> bytes:
        """Return a digest of one uint8 image and what goes with it."""
        text = json.dumps([prompt, pixels.shape, metadata], sort_keys=True, default=repr)
        digest = hashlib.blake2b(text.encode(), digest_size=20)
        digest.update(np.ascontiguousarray(pixels).tobytes())
        return digest.digest()

    def get(self, key: bytes) -> float | None:
        """Return the score, or None if it is not known."""
        if key in self._scores:
            self._scores.move_to_end(key)
        return self._scores.get(key)

    def put(self, key: bytes, score: float) -> None:
        """Remember a score."""
        self._scores[key] = score
        while len(self._scores) > self.capacity:
            self._scores.popitem(last=False)


@dataclass
class Batch:
    """Images for one reward, with what it needs to know of them.

    Attributes:
        pixels: uint8 [b, H, W, 3], NumPy or JAX.
        prompts: b texts.
        metadata: b dictionaries.
        indices: the number of each image in the whole batch, for messages.
        groups: the number of each image's group; None where images have no groups.
    """

    pixels: Any
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    indices: Sequence[int]
    groups: Sequence[int] | None = None

    def __len__(self) -> int:
        """Return b."""
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> Batch:
        """Return some of the images, in the order given."""
        return Batch(
            self.pixels[np.asarray(rows, np.int32)],
            [self.prompts[i] for i in rows],
            [self.metadata[i] for i in rows],
            [self.indices[i] for i in rows],
            None if self.groups is None else [self.groups[i] for i in rows],
        )


@dataclass
class RewardRun:
    """One reward over the images of a batch, part by part.

    Attributes:
        reward: the reward.
        policy: what to do when it fails.
        cache: where its scores are remembered; None for no caching.
        seconds: wall time spent in it.
        hits: images whose score was in the cache.
        notes: what was retried or dropped.
    """

    reward: LoadedReward
    policy: FailurePolicy = FailurePolicy()
    cache: ScoreCache | None = None
    seconds: float = 0.0
    hits: int = 0
    notes: list[str] = field(default_factory=list)

    def __call__(self, batch: Batch) -> np.ndarray:
        """Score a part of the batch.

        Args:
            batch: whole groups if the reward is of a group, else any images.

        Returns:
            float32 [b]; NaN for the images that it failed on, if groups may be dropped.

        Raises:
            RewardError: it failed, and its policy is not to drop the group.
        """
        start = time.perf_counter()
        try:
            return self._cached(batch) if self.cache is not None else self._parts(batch)
        finally:
            self.seconds += time.perf_counter() - start

    def _cached(self, batch: Batch) -> np.ndarray:
        assert self.cache is not None
        pixels = np.asarray(batch.pixels)
        items = zip(pixels, batch.prompts, batch.metadata, strict=True)
        keys = [self.cache.key(*item) for item in items]
        known = {key: self.cache.get(key) for key in keys}
        first: dict[bytes, int] = {}  # where each unknown image is seen first
        for row, key in enumerate(keys):
            if known[key] is None:
                first.setdefault(key, row)
        self.hits += len(keys) - len(first)
        if first:
            new = self._parts(batch.take(list(first.values())))
            for key, score in zip(first, new.tolist(), strict=True):
                known[key] = score
                if np.isfinite(score):
                    self.cache.put(key, score)
        return np.array([known[key] for key in keys], np.float32)

    def _parts(self, batch: Batch) -> np.ndarray:
        """Cut a batch into groups, or into pieces of at most `batch_size`."""
        if self.reward.of_group:
            pieces = _rows_by_group(batch)
        else:
            size = self.reward.batch_size or max(len(batch), 1)
            pieces = [list(range(i, min(i + size, len(batch)))) for i in range(0, len(batch), size)]
        scores = np.zeros(len(batch), np.float32)
        for rows in pieces:
            scores[rows] = self._with_policy(batch if len(pieces) == 1 else batch.take(rows))
        return scores

    def _with_policy(self, batch: Batch) -> np.ndarray:
        name = self.reward.name
        for attempt in range(self.policy.retries + 1):
            try:
                return self._call(batch)
            except RewardError as error:
                # What the user has to mend does not mend itself.
                if isinstance(error.__cause__, UsageError):
                    raise
                if self.policy.kind == "drop-group" and batch.groups is not None:
                    return self._without_failed_groups(batch, error)
                if attempt == self.policy.retries:
                    tries = f" (tried {attempt + 1} times)" if attempt else ""
                    raise RewardError(f"{error}{tries}") from error
                pause = min(BACKOFF_SECONDS * 2**attempt, MAX_BACKOFF_SECONDS)
                self.notes.append(
                    f"reward {name!r}: call {attempt + 1} of {self.policy.retries + 1} failed, "
                    f"again after {pause:g} s: {error}"
                )
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _without_failed_groups(self, batch: Batch, error: RewardError) -> np.ndarray:
        """Score group by group, so that only the groups that fail are lost."""
        groups = _rows_by_group(batch)
        scores = np.full(len(batch), np.nan, np.float32)
        for rows in groups:
            if len(groups) > 1:
                try:
                    scores[rows] = self._call(batch.take(rows))
                    continue
                except RewardError as failure:
                    error = failure
            assert batch.groups is not None
            self.notes.append(f"group {batch.groups[rows[0]]} is dropped: {error}")
        return scores

    def _call(self, batch: Batch) -> np.ndarray:
        reward = self.reward
        # Copies: a reward that works in place must not change what the next one sees.
        images = as_float(batch.pixels) if reward.on_device else np.array(batch.pixels)
        details = [copy.deepcopy(dict(item)) for item in batch.metadata]
        try:
            returned = reward.function(images, list(batch.prompts), details)
        except RewardError as error:  # says itself what the user has to know
            raise RewardError(f"reward {reward.name!r} failed: {error}") from error
        except Exception as error:
            place = describe_error(error, source_file(reward.function))
            raise RewardError(f"reward {reward.name!r} failed: {place}") from error
        return validate_scores(reward.name, returned, len(batch), indices=batch.indices)


def _rows_by_group(batch: Batch) -> list[list[int]]:
    assert batch.groups is not None
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(batch.groups):
        rows.setdefault(group, []).append(row)
    return list(rows.values())


def as_float(pixels: Any) -> Any:
    """Convert uint8 to float32 in [0, 1] on the device (within one unit in the last place)."""
    import jax.numpy as jnp

    return jnp.asarray(pixels).astype(jnp.float32) / 255.0
