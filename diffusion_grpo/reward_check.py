"""Does a reward keep the contract? The same questions to a built-in reward and to a user's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import LoadedReward, RewardError, RewardSet

GROUP_SIZE = 4
_TOLERANCE = 1e-3  # of the spread of the scores: batches are computed in another order


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        verdict: `ok`; `fail`, which breaks the contract; or `note`, which need not.
        text: what was found.
    """

    verdict: Literal["ok", "fail", "note"]
    text: str


def sample_images(count: int, size: int) -> np.ndarray:
    """Return test images: black, white, noise, a ramp, a disc, and soft colored noise.

    Args:
        count: N.
        size: of a side, in pixels.

    Returns:
        uint8 [N, size, size, 3].
    """
    rng = np.random.default_rng(0)
    y, x = np.indices((size, size)) / max(size - 1, 1)
    ramp = np.broadcast_to(x[..., None] * 255, (size, size, 3))
    disc = np.where(np.hypot(x - 0.5, y - 0.5)[..., None] < 0.3, (220, 40, 30), (240, 240, 240))
    images = [np.zeros((size, size, 3)), np.full((size, size, 3), 255), ramp, disc]
    images.append(rng.integers(0, 256, (size, size, 3)))
    while len(images) < count:
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-3, 3, (3, 3))]
        images.append(127.5 + 127.5 * np.stack(waves, axis=-1))
    return np.stack(images[:count]).astype(np.uint8)


def check_reward(
    reward: LoadedReward,
    images: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Finding]:
    """Ask a reward to keep the contract on some images.

    Args:
        reward: what is checked.
        images: uint8 [N, H, W, 3], N a multiple of 4, 8 or more; not all alike.
        prompts: N texts; those of every 4 images in a row are the same.
        metadata: N dictionaries; None for empty ones.

    Yields:
        One finding a question, as soon as there is one; the last after a first failed call.
    """
    count = len(images)
    details = [{}] * count if metadata is None else list(metadata)
    rewards = RewardSet((reward,), (1.0,))

    def score(rows: Sequence[int], size: int | None = GROUP_SIZE) -> np.ndarray:
        rows = list(rows)
        chosen = ([prompts[i] for i in rows], [details[i] for i in rows])
        return rewards(images[rows], *chosen, group_size=size).total

    height, width = images.shape[1:3]
    try:
        rewards.check(prompts, details, group_size=GROUP_SIZE, what="group size")
        score(range(count))  # whatever is done once, loading or compiling, is not timed
        began = time.perf_counter()
        scores = score(range(count))
        seconds = (time.perf_counter() - began) / count
    except (RewardError, UsageError) as error:
        yield Finding("fail", str(error))
        return
    yield Finding(
        "ok",
        f"{count} images of {height}x{width}: one finite number each, from {scores.min():.4g} to "
        f"{scores.max():.4g}, {1000 * seconds:.3g} ms an image",
    )
    if np.ptp(scores) == 0:
        yield Finding("note", "all images score the same: nothing could be learned from that")
    again = score(range(count))
    if np.array_equal(scores, again):
        yield Finding("ok", "the same images again: the same scores")
    else:
        worst = float(np.abs(scores - again).max())
        yield Finding(
            "note",
            f"the same images again: other scores, by up to {worst:.4g}; two runs with the same "
            "seed will differ",
        )
    yield from _check_order(reward, score, scores)
    yield from _check_size(reward, rewards, images, prompts, details)


def _check_order(reward: LoadedReward, score: Any, scores: np.ndarray) -> Iterator[Finding]:
    """Does a score belong to its image, whatever else is in the batch?"""
    count = len(scores)
    allowed = _TOLERANCE * max(float(np.ptp(scores)), 1e-6 + 1e-3 * float(np.abs(scores).max()))

    def same(rows: Sequence[int], found: np.ndarray) -> bool:
        return bool(np.abs(found - scores[list(rows)]).max() <= allowed)

    backwards = list(range(count))[::-1]
    if not same(backwards, score(backwards)):
        yield Finding("fail", "the images in another order: the scores do not follow them")
        return
    if reward.of_group:
        first = list(range(GROUP_SIZE))
        if not same(first, score(first)):
            yield Finding("fail", "one group alone: other scores than among further groups")
            return
        yield Finding("ok", "another order, one group alone: the scores follow their images")
        return
    alone = np.concatenate([score([row], None) for row in range(count)])
    if not same(range(count), alone):
        yield Finding(
            "fail",
            "each image alone: other scores than in a batch. If the reward compares the images of "
            "one prompt with each other, mark it with diffusion_grpo.reward.of_group",
        )
        return
    yield Finding("ok", "another order, each image alone: the scores follow their images")


def _check_size(
    reward: LoadedReward,
    rewards: RewardSet,
    images: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> Iterator[Finding]:
    """Does it take images that are not square?"""
    rows = slice(0, GROUP_SIZE)
    height, width = images.shape[1:3]
    wide = np.concatenate([images[rows], images[rows, :, : width // 2]], axis=2)
    try:
        rewards(wide, prompts[rows], metadata[rows], group_size=GROUP_SIZE)
    except RewardError as error:
        yield Finding("note", f"images of {height}x{wide.shape[2]} are refused: {error}")
    else:
        yield Finding("ok", f"images of {height}x{wide.shape[2]} are scored too")
