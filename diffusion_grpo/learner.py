"""What the two algorithms of a run share: its state, advantages, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_grpo.advantages import (
    RewardHistory,
    best_and_worst,
    clip_advantages,
    running_advantages,
    uninformative_groups,
    weighted_advantages,
)
from diffusion_grpo.config import Config, GRPOOptions
from diffusion_grpo.grpo import adapted_beta
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.mesh import by_rows, placement
from diffusion_grpo.microbatches import Output
from diffusion_grpo.optim import TrainState, make_optimizer
from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.schedule import Schedule, SchedulerConfig, make_schedule
from diffusion_grpo.steps import StepPlan, noise_window


class LearnerState(NamedTuple):
    """All that training changes; a checkpoint holds its leaves.

    Attributes:
        train: parameters, optimizer state and average.
        old: parameters of DiffusionNFT's old policy, or None.
        beta: β, float32 scalar; adapted where there is a target KL.
        history: reward name to `RewardHistory`, for running advantages.
    """

    train: TrainState
    old: Any
    beta: Any
    history: dict[str, RewardHistory]


class Rollout(NamedTuple):
    """The images of one iteration as they were sampled.

    Attributes:
        final: clean latents `[B, h, w, c]`.
        schedule: the denoising steps.
        batch: what the update learns from, advantages still 0.
        plan: which steps it learns from, or None where it learns from none.
        kl: each image's KL to the reference `[B]`, where that is subtracted from the reward.
    """

    final: Any
    schedule: Schedule
    batch: Any
    plan: StepPlan | None = None
    kl: Any = None


def kl_penalty(state: LearnerState, rollout: Rollout) -> np.ndarray | None:
    """Return β KL `[B]` where the KL is in the reward, to be subtracted from it."""
    return None if rollout.kl is None else np.asarray(state.beta * rollout.kl)


def image_advantages(
    options: GRPOOptions,
    scores: Mapping[str, np.ndarray],
    total: Any,
    weights: Sequence[float],
    *,
    kept: np.ndarray,
    group_size: int,
    prompt_index: np.ndarray,
    history: Mapping[str, RewardHistory],
    penalty: np.ndarray | None = None,
) -> tuple[Any, dict[str, RewardHistory]]:
    """Return the advantages of an iteration's images, and the rewards' history with them.

    A group of equal rewards has advantages of 0 whatever the penalty: divided by the group's
    standard deviation, it alone would push as hard as any reward does, however small β is. (Running
    advantages are of the prompt's history, and divide by no group's.)

    Args:
        options: which advantage, of the summed reward or of each.
        scores: reward name to `[B]`, unweighted.
        total: `[B]`, the weighted sum.
        weights: of the rewards, in the order of `scores`.
        kept: `[B]`, false for the images of a group that was dropped, whose advantages are 0.
        group_size: G.
        prompt_index: `[B]`, each image's prompt in its list.
        history: of the iterations before; empty unless the advantages are running ones.
        penalty: `[B]`, subtracted from the total: β KL where that is in the reward.

    Returns:
        Advantages `[B]`, float32; of each reward clipped before they are weighted.
    """
    (rows,) = np.nonzero(kept)
    total = jnp.asarray(total)[rows]
    rewards = {"total": total if penalty is None else total - penalty[rows]}
    factors = {"total": 1.0}
    if options.combine == "advantages":
        rewards = {name: jnp.asarray(score[rows]) for name, score in scores.items()}
        factors = dict(zip(scores, weights, strict=True))
    after = dict(history)
    if options.advantage == "running":
        parts = []
        for name, reward in rewards.items():
            advantages, after[name] = running_advantages(
                reward,
                prompt_index[rows],
                history[name],
                min_count=options.running_min,
                eps=options.advantage_eps,
            )
            advantages = clip_advantages(advantages, options.advantage_clip, options.advantage)
            parts.append(factors[name] * advantages)
        advantages = jnp.stack(parts).sum(axis=0)
    else:
        advantages = weighted_advantages(
            rewards,
            factors,
            group_size,
            kind=options.advantage,
            eps=options.advantage_eps,
            clip=options.advantage_clip,
        )
        if penalty is not None:
            flat = jnp.repeat(uninformative_groups(total, group_size), group_size)
            advantages = jnp.where(flat, 0.0, advantages)
    if len(rows) < len(kept):
        advantages = jnp.zeros(len(kept), jnp.float32).at[rows].set(advantages)
    return advantages, after


class Learner:
    """What the algorithms share: optimizer, schedule, state, advantages, and the choice of images.

    Attributes:
        policy: what it samples and learns with; its batches are in the order of the groups.
        learning_rate: iteration → learning rate.
        check: called again and again while the first of an iteration's gradients is computed, as
            long as the state is what it was; it may raise, and does nothing unless it is set.
        notes: what the user is told at the start, a line each.
    """

    def __init__(
        self,
        config: Config,
        policy: TrainablePolicy,
        scheduler: SchedulerConfig,
        latent: tuple[int, int, int],
    ) -> None:
        """Prepare; see `make_learner`."""
        self.config, self.policy, self.latent = config, policy, latent
        self._scheduler = scheduler
        self.place = placement(full=config.model.trainable == "full")
        self._optimizer, self.learning_rate = make_optimizer(
            config.optim, config.grpo.updates_per_rollout, config.run.iterations
        )
        self.check: Callable[[], None] = do_nothing
        self.notes: list[str] = []

    @property
    def steps_learned(self) -> tuple[int, int]:
        """(A, K): of an image, the recorded steps that take part, and what is differentiated."""
        raise NotImplementedError

    @property
    def sweeps(self) -> tuple[int, int]:
        """How many policies evaluate recorded steps without a gradient; see `LossConfig.sweeps`."""
        return 0, 0

    @property
    def reward_kl_forwards(self) -> int:
        """How many policies evaluate the active steps of every image for a KL in the reward."""
        return 0

    def init(self, num_prompts: int, rewards: Collection[str] = ()) -> LearnerState:
        """Return the state before training.

        Args:
            num_prompts: of the training list, for running advantages.
            rewards: the names in `image_advantages`' scores, if they differ from those of the
                specifications: a reward may name itself.
        """
        options, reference = self.config.grpo, self.policy.trained
        # Copies: an update donates its state, and the reference must outlive it.
        params = _copy(reference)
        average = None if self.config.optim.ema_decay is None else _copy(reference)
        names = (
            rewards or [spec.name for spec in self.config.training_rewards()]
            if options.combine == "advantages"
            else ["total"]
        )
        histories = {}
        if options.advantage == "running":  # of a long list they are large
            empty = RewardHistory.empty(num_prompts, options.running_size)
            histories = dict.fromkeys(names, empty)
        train = TrainState(params, self._optimizer.init(params), average, jnp.int32(0))
        return LearnerState(
            train=self.place(train),
            old=self.place(_copy(reference)) if options.algorithm == "nft" else None,
            beta=jnp.float32(options.beta),
            history=histories,
        )

    def schedule(self, iteration: int) -> Schedule:
        """Return the denoising steps of an iteration, those outside its window deterministic."""
        rollout = self.config.rollout
        steps = make_schedule(self._scheduler, rollout.num_steps, eta=rollout.eta)
        if rollout.window_size is None:
            return steps
        noisy = noise_window(
            steps,
            rollout.window_size,
            start=rollout.window_start,
            every=rollout.window_every,
            iteration=iteration,
        )
        return make_schedule(
            self._scheduler, rollout.num_steps, eta=rollout.eta, stochastic_steps=noisy
        )

    def sample(
        self,
        state: LearnerState,
        iteration: int,
        noise: Any,
        keys: Any,
        conditioning: Any,
        *,
        output: Output | None = None,
    ) -> Rollout:
        """Draw an iteration's images.

        Args:
            state: of training.
            iteration: of the run.
            noise: x_T, `[B, h, w, c]`.
            keys: `[B]`, of the steps' noise.
            conditioning: of the prompts, leaves `[B, ...]`, and of the negative one, `[1, ...]`.
            output: is given the clean latents of each microbatch as they are drawn.
        """
        raise NotImplementedError

    def probe(self, state: LearnerState, rollout: Rollout) -> str | None:
        """Compare log-probs of rollout and update before the first update; says what it found.

        Raises:
            UsageError: they differ by more than the clip range; see `check_drift`.
        """
        return None

    def learn(
        self, state: LearnerState, rollout: Rollout, advantages: Any, iteration: int, keys: Any
    ) -> tuple[LearnerState, list[dict[str, Any]]]:
        """Take the iteration's optimizer steps.

        Args:
            state: of training; donated.
            rollout: of `sample`.
            advantages: `[B]`.
            iteration: of the run.
            keys: `[B]`, of what the loss draws.

        Returns:
            The state, and the metrics of each optimizer step.
        """
        raise NotImplementedError

    def _chosen(self, batch: Any, advantages: Any) -> Any:
        """Return the batch with its advantages, of the best and worst images where asked for."""
        batch = batch._replace(advantages=by_rows(jnp.asarray(advantages)))
        count = self.config.grpo.best_and_worst
        if count is None:
            return batch
        return batch.take(best_and_worst(advantages, self.config.rollout.images_per_prompt, count))

    def _with_beta(
        self, state: LearnerState, history: list[dict[str, Any]]
    ) -> tuple[LearnerState, list[dict[str, Any]]]:
        """Add β to the metrics, and adapt it to the iteration's KL where there is a target."""
        options = self.config.grpo
        if not options.beta:
            return state, history
        beta = float(state.beta)
        history = [metrics | {"beta": beta} for metrics in history]
        if options.kl_target is not None:
            kl = float(np.mean([metrics["kl"] for metrics in history]))
            state = state._replace(beta=jnp.float32(adapted_beta(beta, kl, options.kl_target)))
        return state, history


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
