"""Means with intervals, paired comparisons, and plain measures of pictures. NumPy only.

Scores of the images of one prompt are not independent: every interval here is over prompts, the
images of a prompt being averaged first.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

RESAMPLES = 9999
LEVEL = 0.95
MONITORS = ("sharpness", "saturation", "brightness", "jpeg_kilobytes")
_BLOCK = 16  # images measured at once, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval at `LEVEL`; NaN where it cannot be told."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return `0.123 [0.100, 0.150]`."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(
    values: Float[np.ndarray, " N"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean with its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    N values are drawn with replacement, `resamples` times; the interval is between the quantiles
    (1 ∓ level)/2 of the means.

    Args:
        values: N independent numbers.
        seed: of the resampling, so that the same numbers have the same interval.
        resamples: how often.

    Returns:
        The mean and its interval; for a single value the interval is NaN.
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // len(values))  # bounds the memory
    for start in range(0, resamples, block):
        stop = min(resamples, start + block)
        index = rng.integers(0, len(values), (stop - start, len(values)))
        means[start:stop] = values[index].mean(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def win_rate(
    first: Float[np.ndarray, " N"],
    second: Float[np.ndarray, " N"],
    groups: Sequence[int] | np.ndarray | None = None,
) -> Interval:
    """Return how often `first` is above `second`, pair by pair, with Wilson's score interval.

    A tie is half a win. p̃ ± z √(p(1−p)/n + z²/4n²) / (1 + z²/n) around
    p̃ = (p + z²/2n) / (1 + z²/n) (Wilson 1927), z the normal quantile of the level.

    n is N where each prompt has one image. Images of one prompt are not independent: of P prompts
    n = p(1−p) P/s², at least P and at most N, with s² the variance of the prompts' own rates, so
    that the interval is as wide as that of their mean (effective sample size, Korn & Graubard
    1998); P where p is 0 or 1.

    Args:
        first: N scores.
        second: N scores of the same prompts and seeds.
        groups: the prompt of each image; None where each has its own.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    count: float = len(first)
    if not count:
        return Interval(math.nan, math.nan, math.nan)
    won = (first > second) + 0.5 * (first == second)
    rate = float(won.mean())
    if groups is not None:
        rates = by_prompt(won, groups)
        variance = float(rates.var(ddof=1)) if len(rates) > 1 else math.inf
        if not 0 < rate < 1:
            count = len(rates)
        elif variance:
            count = min(count, max(len(rates), rate * (1 - rate) * len(rates) / variance))
    z = 1.959963984540054  # Φ⁻¹(0.975)
    shrink = 1 + z**2 / count
    center = (rate + z**2 / (2 * count)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / shrink
    return Interval(rate, max(0.0, center - half), min(1.0, center + half))


def standard_error(values: Float[np.ndarray, " N"]) -> float:
    """Standard error of the mean of N independent numbers, s/√N (s with the divisor N−1)."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def by_prompt(
    values: Float[np.ndarray, " B"], groups: Sequence[int] | np.ndarray
) -> Float[np.ndarray, " P"]:
    """Average the images of each prompt.

    Args:
        values: one number an image.
        groups: the prompt of each image; the order of the prompts is that of these numbers.
    """
    values = np.asarray(values, np.float64)
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values) / np.bincount(index)


def monitor(images: UInt8[np.ndarray, "B H W 3"]) -> dict[str, Float[np.ndarray, " B"]]:
    """Measure what a hacked reward often spoils: `MONITORS` of every image, float64 [B].

    - `sharpness`: the standard deviation of the discrete Laplacian of the luma (Rec. 601), in
      levels of 0 to 255; blur lowers it, grids and noise raise it.
    - `saturation`: the mean of (max − min) / max of the channels (HSV's S), 0 to 1.
    - `brightness`: the mean luma, 0 to 255.
    - `jpeg_kilobytes`: the size of the image as a JPEG of quality 95, in 1000 bytes.
    """
    blocks = [_monitor(images[i : i + _BLOCK]) for i in range(0, len(images), _BLOCK)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in MONITORS}


def _monitor(images: UInt8[np.ndarray, "B H W 3"]) -> dict[str, Float[np.ndarray, " B"]]:
    luma = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    sharpness = (around - 4 * inner).std(axis=(1, 2))
    highest = images.max(axis=-1).astype(np.float64)
    chroma = highest - images.min(axis=-1)
    saturation = np.where(highest > 0, chroma / np.maximum(highest, 1), 0.0).mean(axis=(1, 2))
    sizes = np.array([_jpeg_size(image) / 1000 for image in images])
    measured = (sharpness, saturation, luma.mean(axis=(1, 2)), sizes)
    return dict(zip(MONITORS, measured, strict=True))


def _jpeg_size(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.tell()


def diversity(
    images: UInt8[np.ndarray, "B H W 3"], groups: Sequence[int] | np.ndarray, *, size: int = 32
) -> Float[np.ndarray, " P"]:
    """Return how different the images of each prompt are from each other, float64 [P].

    The mean over all pairs of a prompt's images of their root-mean-square difference, 0 to 1, after
    area-averaging to `size` × `size`: 0 when the model draws one picture again and again. NaN for a
    prompt of one image.
    """
    small = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
            for image in images
        ]
    ).reshape(len(images), -1)
    small = small.astype(np.float64) / 255
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    means = np.full(len(names), np.nan)
    for group in range(len(names)):
        members = small[index == group]
        if len(members) > 1:
            left, right = np.triu_indices(len(members), k=1)
            gaps = np.sqrt(np.square(members[left] - members[right]).mean(axis=1))
            means[group] = gaps.mean()
    return means
