"""Rewards: the contract, and how several rewards are run and combined.

A reward is a callable that scores a batch of images, higher is better::

    def my_reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        '''images: uint8 [B, H, W, 3]; returns float32 [B].'''

A reward marked with `on_device` receives the images as a float32 JAX array in [0, 1] instead,
with no round trip to the host: the same 8-bit values, divided by 255. A reward with options is
built by a function marked with `reward_factory`, whose keyword parameters are the options. Three
attributes of a reward are read if it has them: `on_device`, `name` (its name in the metrics) and
`batch_size` (the most images it is given at once).

A reward is named `clip` (built in: a file of `rewards/`), `my_file.py`, `my_file.py:sharpness`,
`package.module:function`, or by an installed entry point of the group `diffusion_grpo.rewards`. A
built-in reward is loaded exactly as a user's file is, so a copy of it is a good start for one's
own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from diffusion_grpo.errors import RewardError, UsageError
from diffusion_grpo.images import to_uint8
from diffusion_grpo.reward_loading import (
    ENTRY_POINT_GROUP,
    LoadedReward,
    describe_error,
    list_rewards,
    load_reward,
    source_file,
    wrap_reward,
)
from diffusion_grpo.reward_specs import RewardSpec, parse_reward_specs

__all__ = [
    "ENTRY_POINT_GROUP",
    "LoadedReward",
    "Reward",
    "RewardError",
    "RewardResult",
    "RewardSet",
    "RewardSpec",
    "combine",
    "list_rewards",
    "load_reward",
    "on_device",
    "parse_reward_specs",
    "reward_factory",
    "validate_scores",
    "wrap_reward",
]

_F = TypeVar("_F", bound=Callable[..., Any])


class Reward(Protocol):
    """A callable that scores images; see the module's docstring."""

    def __call__(self, images: Any, prompts: list[str], metadata: list[dict[str, Any]], /) -> Any:
        """Score a batch.

        Args:
            images: uint8 NumPy [B, H, W, 3]; float32 JAX in [0, 1] for a reward on the device.
            prompts: B texts.
            metadata: B dictionaries, what the prompt file says about each prompt beside its text.

        Returns:
            float32 [B], finite, higher is better.
        """


def reward_factory(factory: _F) -> _F:
    """Mark a function whose keyword parameters are options and which returns a reward.

    Args:
        factory: called once, when the run starts, with the options that the user gave. Text is
            converted by the parameters' annotations: `int`, `float`, `bool`, `str`, `Path`,
            `Literal`, or one of these `| None`.

    Returns:
        The same function, marked.
    """
    factory.is_reward_factory = True  # type: ignore[attr-defined]
    return factory


def on_device(reward: _F) -> _F:
    """Mark a reward that takes its images as a float32 JAX array [B, H, W, 3] in [0, 1].

    Args:
        reward: called as `reward(images, prompts, metadata)`, returns a float32 JAX array [B].

    Returns:
        The same callable, marked.
    """
    reward.on_device = True  # type: ignore[attr-defined]
    return reward


@dataclass(frozen=True)
class RewardResult:
    """What a batch of images scored.

    Attributes:
        scores: reward name to float32 [B], unweighted.
        total: float32 [B], Σ_k w_k r_k.
        seconds: reward name to the wall time it took, transfers included.
    """

    scores: dict[str, np.ndarray]
    total: np.ndarray
    seconds: dict[str, float]


def combine(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Combine several rewards into one: r = Σ_k w_k r_k.

    Args:
        scores: reward name to float32 [B].
        weights: reward name to its weight; the same names.

    Returns:
        float32 [B]; summed in float64, so that the order of the rewards does not show.

    Raises:
        ValueError: the names differ.
    """
    if set(scores) != set(weights):
        raise ValueError(f"scores of {sorted(scores)} but weights of {sorted(weights)}")
    terms = [weights[name] * score.astype(np.float64) for name, score in scores.items()]
    return np.sum(terms, axis=0).astype(np.float32)


@dataclass(frozen=True)
class RewardSet:
    """Several rewards with their weights, called as one.

    Attributes:
        rewards: the rewards, of different names.
        weights: one a reward.
    """

    rewards: tuple[LoadedReward, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that names are unique and that weights and rewards correspond.

        Raises:
            UsageError: two rewards have the same name, or there is none.
        """
        names = [reward.name for reward in self.rewards]
        if not names or len(names) != len(self.weights):
            raise UsageError(
                f"{len(names)} rewards and {len(self.weights)} weights: expected one each"
            )
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two rewards have the name {name!r} in the metrics: rename one")

    @classmethod
    def load(cls, specs: Sequence[RewardSpec]) -> RewardSet:
        """Load every reward of `parse_reward_specs`.

        Args:
            specs: the rewards to load, with weights and options.

        Returns:
            The rewards, in that order.

        Raises:
            UsageError: as `load_reward`.
        """
        loaded = tuple(load_reward(spec.spec, spec.options) for spec in specs)
        return cls(loaded, tuple(spec.weight for spec in specs))

    def __call__(
        self,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardResult:
        """Run every reward on a batch and combine the scores.

        Args:
            images: [B, H, W, 3], NumPy or JAX; uint8, or floating in [0, 1], which is clipped and
                rounded to multiples of 1/255 once, so that all rewards judge the same picture.
            prompts: B texts.
            metadata: B dictionaries; None for empty ones.

        Returns:
            Scores, their weighted sum and the time of each reward.

        Raises:
            ValueError: the images are of another shape or not finite, or the counts differ.
            RewardError: a reward raised, or returned something that is not B finite numbers.
        """
        pixels = _quantize(images)
        count = len(pixels)
        metadata = [{}] * count if metadata is None else metadata
        if not len(prompts) == len(metadata) == count:
            raise ValueError(
                f"{count} images, {len(prompts)} prompts and {len(metadata)} metadata: "
                "expected the same number of each"
            )
        on_host = np.asarray(pixels) if any(not r.on_device for r in self.rewards) else pixels
        scores: dict[str, np.ndarray] = {}
        seconds: dict[str, float] = {}
        for reward in self.rewards:
            start = time.perf_counter()
            source = pixels if reward.on_device else on_host
            scores[reward.name] = _score(reward, source, prompts, metadata)
            seconds[reward.name] = time.perf_counter() - start
        names = [reward.name for reward in self.rewards]
        total = combine(scores, dict(zip(names, self.weights, strict=True)))
        return RewardResult(scores, total, seconds)


def _score(
    reward: LoadedReward, pixels: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Run one reward over a batch, at most `batch_size` images at a time."""
    size = reward.batch_size or max(len(pixels), 1)
    parts = []
    for start in range(0, len(pixels), size):
        chunk = slice(start, start + size)
        # Copies: a reward that works in place must not change what the next one sees.
        batch = _as_float(pixels[chunk]) if reward.on_device else np.array(pixels[chunk])
        details = [dict(item) for item in metadata[chunk]]
        try:
            returned = reward.function(batch, list(prompts[chunk]), details)
        except Exception as error:
            place = describe_error(error, source_file(reward.function))
            raise RewardError(f"reward {reward.name!r} failed: {place}") from error
        parts.append(validate_scores(reward.name, returned, len(batch), offset=start))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def validate_scores(name: str, returned: Any, count: int, *, offset: int = 0) -> np.ndarray:
    """Check that a reward returned one finite number an image.

    Args:
        name: the reward, for messages.
        returned: what it returned: an array of any library, or a list of numbers.
        count: how many images it was given.
        offset: the index of the first of them, for messages.

    Returns:
        float32 [count].

    Raises:
        RewardError: another shape, another count, not numbers, or NaN or infinity; names the reward
            and the first bad index.
    """
    expected = f"expected float32 of shape ({count},), one score an image"
    if returned is None:
        raise RewardError(f"reward {name!r} returned None, {expected}: is a return missing?")
    try:
        scores = np.asarray(returned)
    except Exception as error:
        raise RewardError(
            f"reward {name!r} returned {type(returned).__name__}, which is not an array "
            f"({type(error).__name__}: {error}); {expected}"
        ) from error
    if scores.ndim != 1:
        mend = "; squeeze its last axis" if scores.shape == (count, 1) else ""
        raise RewardError(f"reward {name!r} returned shape {scores.shape}, {expected}{mend}")
    first_missing = offset + min(len(scores), count)
    if len(scores) < count:
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {count} images: "
            f"image {first_missing} is the first without one"
        )
    if len(scores) > count:
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {count} images: "
            f"score {first_missing} is the first without an image"
        )
    with np.errstate(over="ignore"):
        for index, score in enumerate(scores):
            # Every real number type, ml_dtypes' bfloat16 included, casts safely to float64.
            if not np.can_cast(np.asarray(score).dtype, np.float64, casting="safe"):
                raise RewardError(
                    f"reward {name!r} returned {score!r} ({scores.dtype}) for image "
                    f"{offset + index}, not a number; {expected}"
                )
        result = scores.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(result))
    if bad.size:
        raise RewardError(
            f"reward {name!r} returned {scores[bad[0]]} for image {offset + int(bad[0])} "
            f"({bad.size} of {count} scores are not finite in float32)"
        )
    return result


def _quantize(images: Any) -> Any:
    """Check images and bring them to uint8, where they are: NumPy stays NumPy, JAX stays JAX."""
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


def _as_float(pixels: Any) -> Any:
    """Convert uint8 to float32 in [0, 1] on the device (within one unit in the last place)."""
    import jax.numpy as jnp

    return jnp.asarray(pixels).astype(jnp.float32) / 255.0
