"""Rewards: the contract, and how several rewards are run and combined.

A reward is a callable that scores a batch of images, higher is better::

    def my_reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        '''images: uint8 [B, H, W, 3]; returns float32 [B].'''

A reward marked with `on_device` receives the images as a float32 JAX array in [0, 1] instead,
with no round trip to the host: the same 8-bit values, divided by 255. One marked with `of_group`
compares the images of one prompt with each other: it is called with one group at a time. A reward
with options is built by a function marked with `reward_factory`, whose keyword parameters are the
options. These attributes of a reward are read if it has them:

- `on_device`, `of_group`: what the marks set.
- `name`: its name in the metrics.
- `batch_size`: the most images it is given at once; a group is never cut.
- `check`: called as `check(prompts, metadata)` with all prompts of a run before it starts; raises
  `UsageError` for one that it cannot judge.

A reward is named `clip` (built in: a file of `rewards/`), `my_file.py`, `my_file.py:sharpness`,
`package.module:function`, by an installed entry point of the group `diffusion_grpo.rewards`, or by
the URL of a reward server. A built-in reward is loaded exactly as a user's file is, so a copy of it
is a good start for one's own; `diffusion-grpo check-reward my_file.py` says whether a reward keeps
the contract.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from diffusion_grpo.errors import RewardError, UsageError
from diffusion_grpo.reward_failure import FailurePolicy
from diffusion_grpo.reward_loading import (
    ENTRY_POINT_GROUP,
    LoadedReward,
    list_rewards,
    load_reward,
    wrap_reward,
)
from diffusion_grpo.reward_run import RewardRun, ScoreCache
from diffusion_grpo.reward_scores import (
    Combination,
    RewardResult,
    combine,
    validate_scores,
)
from diffusion_grpo.reward_scoring import Scoring
from diffusion_grpo.reward_specs import RewardSpec, parse_reward_specs

__all__ = [
    "ENTRY_POINT_GROUP",
    "FailurePolicy",
    "LoadedReward",
    "Reward",
    "RewardError",
    "RewardResult",
    "RewardSet",
    "RewardSpec",
    "Scoring",
    "combine",
    "list_rewards",
    "load_reward",
    "of_group",
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


def of_group(reward: _F) -> _F:
    """Mark a reward that compares the images of one prompt with each other.

    Args:
        reward: called as `reward(images, prompts, metadata)` with the G images of one group, whose
            prompts are all the same; returns G scores.

    Returns:
        The same callable, marked.
    """
    reward.of_group = True  # type: ignore[attr-defined]
    return reward


@dataclass(frozen=True)
class RewardSet:
    """Several rewards with their weights, called as one.

    Attributes:
        rewards: the rewards, of different names.
        weights: one a reward.
        combination: how they become one number, see `combine`.
        pessimism: κ of `combine`'s ensemble.
        policies: what to do when a reward fails, one a reward; empty to stop at any.
        caches: where scores are remembered, one a reward, None for those that are not cached;
            empty for none.
        max_dropped: the largest share of a batch's groups that may be dropped.
    """

    rewards: tuple[LoadedReward, ...]
    weights: tuple[float, ...]
    combination: Combination = "weighted"
    pessimism: float = 1.0
    policies: tuple[FailurePolicy, ...] = ()
    caches: tuple[ScoreCache | None, ...] = ()
    max_dropped: float = 0.25

    def __post_init__(self) -> None:
        """Check that names are unique and that weights and rewards correspond.

        Raises:
            UsageError: two rewards have the same name, or there is none; a reward of a group is
                cached.
        """
        names = [reward.name for reward in self.rewards]
        if not names or len(names) != len(self.weights):
            raise UsageError(
                f"{len(names)} rewards and {len(self.weights)} weights: expected one each"
            )
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two rewards have the name {name!r} in the metrics: rename one")
        object.__setattr__(self, "policies", self.policies or (FailurePolicy(),) * len(names))
        object.__setattr__(self, "caches", self.caches or (None,) * len(names))
        for reward, cache in zip(self.rewards, self.caches, strict=True):
            if reward.of_group and cache is not None:
                raise UsageError(
                    f"reward.cache has {reward.name!r}, which compares the images of a group: what "
                    "an image scores there depends on the others; leave it out"
                )

    @property
    def weight_of(self) -> dict[str, float]:
        """Name → weight."""
        return dict(zip((reward.name for reward in self.rewards), self.weights, strict=True))

    @classmethod
    def load(
        cls,
        specs: Sequence[RewardSpec],
        *,
        combination: Combination = "weighted",
        pessimism: float = 1.0,
        policies: Mapping[str, FailurePolicy] | None = None,
        cache: Collection[str] = (),
        max_dropped: float = 0.25,
    ) -> RewardSet:
        """Load every reward of `parse_reward_specs`.

        Args:
            specs: the rewards to load, with weights and options.
            combination: as the attribute.
            pessimism: as the attribute.
            policies: reward name to what to do when it fails; the others stop.
            cache: the names of the rewards whose scores are remembered.
            max_dropped: as the attribute.

        Returns:
            The rewards, in that order.

        Raises:
            UsageError: as `load_reward` and the constructor.
        """
        policies = policies or {}
        loaded = tuple(load_reward(spec.spec, spec.options) for spec in specs)
        return cls(
            loaded,
            tuple(spec.weight for spec in specs),
            combination,
            pessimism,
            tuple(policies.get(spec.name, FailurePolicy()) for spec in specs),
            tuple(ScoreCache() if spec.name in cache else None for spec in specs),
            max_dropped,
        )

    @property
    def checks_prompts(self) -> bool:
        """Whether a reward says, by a `check` of its own, which prompts it can judge."""
        return any(hasattr(reward.function, "check") for reward in self.rewards)

    def check(
        self,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        *,
        group_size: int,
        what: str,
    ) -> None:
        """Find out, before any work, whether the rewards can judge these prompts.

        Args:
            prompts: all that will be asked for.
            metadata: one dictionary each.
            group_size: images of each prompt.
            what: the field that says so, for the message.

        Raises:
            UsageError: a reward compares the images of a group and there is only one, or cannot
                judge a prompt.
        """
        for reward in self.rewards:
            if reward.of_group and group_size < 2:
                raise UsageError(
                    f"{what} is {group_size}, but reward {reward.name!r} compares the images of "
                    "one prompt with each other; expected 2 or more"
                )
            check = getattr(reward.function, "check", None)
            if check is not None:
                check(list(prompts), [copy.deepcopy(dict(item)) for item in metadata])

    def start(
        self,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        group_size: int | None = None,
        may_drop: bool = False,
        order: np.ndarray | None = None,
    ) -> Scoring:
        """Prepare to score images as they come.

        Args:
            prompts: B texts, those of a group side by side.
            metadata: B dictionaries; None for empty ones.
            group_size: G; None if the images have no groups.
            may_drop: whether groups may be left out where a reward's policy says so; otherwise
                such a failure raises.
            order: the places of the images in the order in which they will come.

        Returns:
            A context to `add` images to and take the `result` of.

        Raises:
            ValueError: the counts differ.
            UsageError: a reward compares the images of a group, and there are no groups.
        """
        runs = []
        for reward, policy, cache in zip(self.rewards, self.policies, self.caches, strict=True):
            if policy.kind == "drop-group" and not may_drop:
                policy = FailurePolicy()
            runs.append(RewardRun(reward, policy, cache))
        names = [reward.name for reward in self.rewards]
        return Scoring(
            runs,
            prompts,
            [{}] * len(prompts) if metadata is None else metadata,
            weights=dict(zip(names, self.weights, strict=True)),
            combination=self.combination,
            pessimism=self.pessimism,
            group_size=group_size,
            max_dropped=self.max_dropped,
            order=order,
        )

    def __call__(
        self,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        group_size: int | None = None,
    ) -> RewardResult:
        """Run every reward on a batch and combine the scores; any failure raises.

        Args:
            images: [B, H, W, 3], NumPy or JAX; uint8, or floating in [0, 1], which is clipped and
                rounded to multiples of 1/255 once, so that all rewards judge the same picture.
            prompts: B texts.
            metadata: B dictionaries; None for empty ones.
            group_size: G, for rewards that compare the images of a group.

        Returns:
            Scores, the combined total and the time of each reward.

        Raises:
            ValueError: the images are of another shape or not finite, or the counts differ.
            UsageError: a reward compares the images of a group, and there are no groups.
            RewardError: a reward raised, or returned something that is not B finite numbers.
        """
        with self.start(prompts, metadata, group_size=group_size) as scoring:
            scoring.add(images)
            return scoring.result()
