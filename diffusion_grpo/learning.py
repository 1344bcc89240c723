"""The two algorithms of the run behind one face: GRPO on trajectories, and DiffusionNFT.

A learner samples an iteration's images and learns from their advantages. Prompts, rewards,
evaluation and everything else are the same for both, and are `train.py`'s.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_grpo.config import Config
from diffusion_grpo.consistency import images_learned_from, images_sharing_a_prompt
from diffusion_grpo.gaussian import Reduction
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.learner import Learner, LearnerState, Rollout
from diffusion_grpo.loss import CompiledLoss, LossConfig, compile_loss
from diffusion_grpo.mesh import Place, by_rows, join_rows, replicated, shards, to_host
from diffusion_grpo.microbatches import (
    Output,
    chunks,
    make_final_rollout,
    make_policy_steps,
    make_rollout,
)
from diffusion_grpo.nft import (
    CompiledNFT,
    NFTBatch,
    NFTConfig,
    compile_nft,
    draw_timesteps,
    make_nft_gradient,
)
from diffusion_grpo.optim import make_update, moved_average
from diffusion_grpo.pipeline import PolicyStructure, TrainablePolicy
from diffusion_grpo.probe import check_drift, measure_drift
from diffusion_grpo.program_cache import network_jit, shared_programs
from diffusion_grpo.rollout import fold_each
from diffusion_grpo.schedule import Schedule, SchedulerConfig, alphas_cumprod
from diffusion_grpo.steps import StepPlan, choose_steps, plan_steps, update_draw
from diffusion_grpo.trajectories import ESTIMATORS, PolicySteps, UpdateBatch, trajectory_kl
from diffusion_grpo.update import make_gradient


def make_learner(
    config: Config,
    policy: TrainablePolicy,
    scheduler: SchedulerConfig,
    latent: tuple[int, int, int],
) -> Learner:
    """Prepare the configured algorithm; nothing is compiled yet.

    Args:
        config: the run's, validated.
        policy: the split UNet, as training starts: its parameters are the reference's.
        scheduler: the checkpoint's noise schedule.
        latent: (h, w, c).

    Raises:
        UsageError: the window or the step weights leave no step with noise under this schedule.
    """
    kind = NFTLearner if config.grpo.algorithm == "nft" else GRPOLearner
    group = images_sharing_a_prompt(config.rollout, config.grpo, shards())
    return kind(config, policy.of_groups(group), scheduler, latent)


class GRPOLearner(Learner):
    """GRPO on the log-probs of the denoising steps."""

    def __init__(
        self,
        config: Config,
        policy: TrainablePolicy,
        scheduler: SchedulerConfig,
        latent: tuple[int, int, int],
    ) -> None:
        """Prepare; see `make_learner`."""
        super().__init__(config, policy, scheduler, latent)
        options = config.grpo
        in_loss: Any = options.kl if options.beta and options.kl_in == "loss" else None
        loss = LossConfig(
            ratio=options.ratio,
            ratio_base=options.ratio_base,
            reduction=options.log_prob_reduction,
            kl=in_loss,
            entropy_coeff=options.entropy_coeff if options.learn_noise_scale else 0.0,
            guard=options.guard,
            dppo_kl=options.dppo_kl,
            learned_noise=options.learn_noise_scale,
            microbatch=options.images_at_once,
        )
        self.loss = _loss_programs(policy.structure, loss, self.place)
        self._update = make_update(
            make_gradient(self.loss),
            self._optimizer,
            ema_decay=config.optim.ema_decay,
            place=self.place,
        )
        self._draw = make_rollout(config, policy)
        size = math.gcd(config.rollout.images_at_once, images_learned_from(config.rollout, options))
        self._reference_steps = make_policy_steps(
            policy, size=size, reduction=loss.reduction, means=loss.needs_reference_means
        )
        self._old_steps = make_policy_steps(policy, size=size, reduction=loss.reduction, means=True)
        self._image_kl = _image_kl(
            policy.structure, options.kl, options.log_prob_reduction, options.learn_noise_scale
        )
        every, positions = config.rollout.window_every, config.rollout.num_steps
        for number in range(positions if every else 1):  # each place of a moving window has steps
            self.plan(self.schedule(number * every), number * every)
        self.notes = _notes(config, self.plan(self.schedule(0), 0), latent)

    @property
    def steps_learned(self) -> tuple[int, int]:
        """(A, K): the steps that take part, and those that are differentiated."""
        active = len(self.plan(self.schedule(0), 0).active)
        return active, self.config.grpo.gradient_steps or active

    @property
    def sweeps(self) -> tuple[int, int]:
        """How many policies evaluate recorded steps without a gradient; see `LossConfig.sweeps`."""
        return self.loss.config.sweeps(self.config.grpo.updates_per_rollout)

    @property
    def reward_kl_forwards(self) -> int:
        """How many policies evaluate the active steps of every image for a KL in the reward."""
        options = self.config.grpo
        if options.kl_in != "reward":
            return 0
        return 1 if options.kl in ESTIMATORS else 2  # of those, what the policy says is recorded

    def plan(self, schedule: Schedule, iteration: int) -> StepPlan:
        """Return which steps an iteration learns from, their weights and the clip range."""
        options = self.config.grpo
        return plan_steps(
            schedule,
            latent_size=math.prod(self.latent),
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            draw=(self.config.run.seed, iteration),
            ratio=options.ratio,
            reduction=options.log_prob_reduction,
            weights=options.step_weights,
            given=options.given_weights,
            fraction=options.timestep_fraction,
            gamma=options.gamma,
            dual_clip=options.dual_clip,
            scale_clip=options.clip_scale == "auto",
            guard=options.guard,
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
        """Draw trajectories of the policy as it is, with their log-probs."""
        schedule = self.schedule(iteration)
        trajectory = self._draw(
            state.train.params,
            self.policy.frozen,
            schedule,
            noise,
            keys,
            conditioning,
            output=output,
        )
        batch = UpdateBatch(trajectory, conditioning, by_rows(jnp.zeros(len(noise), jnp.float32)))
        rollout = Rollout(trajectory.final, schedule, batch, self.plan(schedule, iteration))
        if self.config.grpo.kl_in == "reward":
            rollout = rollout._replace(kl=self._kl_of_images(state, rollout))
        return rollout

    def probe(self, state: LearnerState, rollout: Rollout) -> str | None:
        """Measure the drift over the programs of the update."""
        options, plan = self.config.grpo, rollout.plan
        assert plan is not None
        # Before the advantages are known, any images do; as many as an update takes.
        rows = slice(0, images_learned_from(self.config.rollout, options))
        batch = self._described(state, rollout._replace(batch=rollout.batch.take(rows)), None)
        arguments = (state.train.params, self.policy.frozen, rollout.schedule, batch, plan)
        drift = measure_drift(self.loss, *arguments)
        return check_drift(drift, plan, clips=options.dppo_kl is None, allow=options.allow_drift)

    def learn(
        self, state: LearnerState, rollout: Rollout, advantages: Any, iteration: int, keys: Any
    ) -> tuple[LearnerState, list[dict[str, Any]]]:
        """Update on the trajectories; at the first update ρ is 1 and needs no forward sweep."""
        del keys  # every draw is of the steps, which all images share
        options, plan = self.config.grpo, rollout.plan
        assert plan is not None
        batch = self._described(state, rollout, advantages)
        train, history = state.train, []
        for number in range(options.updates_per_rollout):
            draw = update_draw(self.config.run.seed, iteration, number)
            steps = choose_steps(plan.active, options.gradient_steps, draw)
            train, metrics = self._update(
                train,
                self.policy.frozen,
                rollout.schedule,
                batch,
                plan._replace(steps=steps),
                state.beta,
                on_policy=number == 0,
                check=do_nothing if number else self.check,
            )
            history.append(metrics)
        history = to_host(history)
        if options.ratio_base == "old" and len(history) > 1:
            for name in ("clip_fraction", "approx_kl", "ratio/mean"):
                del history[0][name]  # ρ is 1 there, and would be counted as a measurement
        if rollout.kl is not None:
            history = [metrics | {"kl": float(rollout.kl.mean())} for metrics in history]
        if self.policy.learns_noise:
            scales = np.exp(to_host(train.params["log_noise_scale"]))
            ends = {"noise_scale/min": scales.min(), "noise_scale/max": scales.max()}
            history = [metrics | ends for metrics in history]
        return self._with_beta(state._replace(train=train), history)

    def _described(
        self, state: LearnerState, rollout: Rollout, advantages: Any | None
    ) -> UpdateBatch:
        """Return the images learned from, with what the loss needs of other policies."""
        batch: UpdateBatch = rollout.batch
        if advantages is not None:
            batch = self._chosen(batch, advantages)
        assert rollout.plan is not None
        loss, active = self.loss.config, rollout.plan.active
        common = self.policy.frozen, rollout.schedule, batch, active
        reference, old = PolicySteps(), PolicySteps()
        if loss.needs_reference_means or loss.needs_reference_log_probs:
            reference = self._reference_steps(self.policy.trained, *common)
        if loss.needs_old_means:
            old = self._old_steps(state.train.params, *common)
        return batch._replace(reference=reference, old=old)

    def _kl_of_images(self, state: LearnerState, rollout: Rollout) -> Any:
        """Return each image's KL to the reference `[B]`, at the policy that sampled it."""
        batch: UpdateBatch = rollout.batch
        assert rollout.plan is not None
        arguments = state.train.params, self.policy.trained, self.policy.frozen, rollout.schedule
        each = [
            self._image_kl(*arguments, batch.take(rows), rollout.plan.active)
            for rows in chunks(len(batch.advantages), self.config.rollout.images_at_once)
        ]
        return replicated(join_rows(each))


class NFTLearner(Learner):
    """DiffusionNFT on the final latents; see `nft.py`."""

    def __init__(
        self,
        config: Config,
        policy: TrainablePolicy,
        scheduler: SchedulerConfig,
        latent: tuple[int, int, int],
    ) -> None:
        """Prepare; see `make_learner`."""
        super().__init__(config, policy, scheduler, latent)
        loss = NFTConfig(
            prediction_type=scheduler.prediction_type,
            beta=config.nft.beta,
            advantage_max=config.grpo.advantage_clip,
            penalty=config.grpo.beta > 0,
            microbatch=config.grpo.images_at_once,
        )
        self.loss = _nft_programs(policy.structure, loss, scheduler, self.place)
        self._update = make_update(
            make_nft_gradient(self.loss),
            self._optimizer,
            ema_decay=config.optim.ema_decay,
            place=self.place,
        )
        self._draw = make_final_rollout(config, policy)
        self.schedule(0)  # refuses a window that does not fit
        if scheduler.prediction_type == "epsilon":
            self.notes.append(
                "DiffusionNFT on an epsilon-prediction checkpoint: its noisiest timesteps learn "
                "little, since a change of the image is a tiny change of epsilon there"
            )

    @property
    def steps_learned(self) -> tuple[int, int]:
        """No recorded step takes part, and an image is differentiated at K timesteps."""
        return 0, self.config.nft.timesteps

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
        """Draw clean latents of the old policy."""
        schedule = self.schedule(iteration)
        arguments = state.old, self.policy.frozen, schedule, noise, keys, conditioning
        final = self._draw(*arguments, output=output)
        zeros = by_rows(jnp.zeros(len(noise), jnp.float32))
        return Rollout(final, schedule, NFTBatch(final, conditioning, zeros, None, None))

    def learn(
        self, state: LearnerState, rollout: Rollout, advantages: Any, iteration: int, keys: Any
    ) -> tuple[LearnerState, list[dict[str, Any]]]:
        """Update on noised clean latents, then let the old policy follow."""
        options, train, history = self.config.grpo, state.train, []
        advantages = self._in_deviations(advantages)
        for number in range(options.updates_per_rollout):
            drawn = fold_each(keys, number)
            # Keys of their own: a key's children are the same for whatever is drawn with it.
            first, second = jnp.moveaxis(jax.vmap(jax.random.split)(drawn), 1, 0)
            timesteps = draw_timesteps(first, rollout.schedule.timesteps, self.config.nft.timesteps)
            batch = self._chosen(
                rollout.batch._replace(timesteps=timesteps, keys=second), advantages
            )
            train, metrics = self._update(
                train,
                state.old,
                self.policy.trained,
                self.policy.frozen,
                batch,
                state.beta,
                check=do_nothing if number else self.check,
            )
            history.append(metrics)
        decay = min(self.config.nft.decay, self.config.nft.decay_rise * iteration)
        old = _follow(state.old, train.params, jnp.float32(decay))
        history = to_host(history)
        return self._with_beta(state._replace(train=train, old=old), history)

    def _in_deviations(self, advantages: Any) -> Any:
        """Return the advantages in standard deviations, as `NFTConfig.advantage_max` is.

        Those that are in units of the reward divided by the batch's √(mean A²); a weighted sum of
        several by the sum of the weights.
        """
        options, advantages = self.config.grpo, jnp.asarray(advantages)
        if options.advantage in ("group_mean", "leave_one_out"):
            return advantages / (jnp.sqrt(jnp.square(advantages).mean()) + options.advantage_eps)
        if options.combine == "advantages":
            return advantages / sum(abs(spec.weight) for spec in self.config.training_rewards())
        return advantages


@shared_programs
def _loss_programs(policy: PolicyStructure, config: LossConfig, place: Place) -> CompiledLoss:
    return compile_loss(policy.denoiser, config, policy.noise, place=place)


@shared_programs
def _nft_programs(
    policy: PolicyStructure, config: NFTConfig, scheduler: SchedulerConfig, place: Place
) -> CompiledNFT:
    return compile_nft(policy.denoiser, config, alphas_cumprod(scheduler), place=place)


@shared_programs
def _image_kl(policy: PolicyStructure, kind: Any, reduction: Reduction, learned_noise: bool) -> Any:
    @network_jit
    def image_kl(
        params: Any,
        reference: Any,
        frozen: Any,
        schedule: Schedule,
        batch: UpdateBatch,
        active: Any,
    ) -> Any:
        return trajectory_kl(
            policy.denoiser(params, frozen),
            policy.noise(params, schedule),
            policy.denoiser(reference, frozen),
            schedule,
            batch.trajectory,
            batch.conditioning,
            active,
            kind=kind,
            reduction=reduction,
            learned_noise=learned_noise,
        )

    return image_kl


_follow = jax.jit(moved_average, donate_argnums=0)


def _notes(config: Config, plan: StepPlan, latent: tuple[int, int, int]) -> list[str]:
    """Say what the options come to, and which of them have no effect."""
    options = config.grpo
    notes = []
    if options.dppo_kl is None:
        low, high = 1 - float(plan.clip_low), 1 + float(plan.clip_high)
        size = " x ".join(map(str, latent))
        over = "1 step" if options.ratio == "step" else f"{len(plan.active)} steps"
        how = f"for a latent of {size}, {over}, reduction {options.log_prob_reduction!r}"
        if options.clip_scale == "none":
            how = "as given"
        notes.append(f"clip range: the ratio acts within {low:.6g} to {high:.6g} ({how})")
        if options.updates_per_rollout == 1 and options.ratio_base == "old":
            notes.append(
                "with one update a rollout the ratio is always 1, so that clipping never acts"
            )
    if options.entropy_coeff and not options.learn_noise_scale:
        notes.append(
            f"grpo.entropy_coeff {options.entropy_coeff} has no effect: the entropy of a fixed "
            "noise schedule has no gradient (grpo.learn_noise_scale gives it one)"
        )
    if options.kl == "k1" and options.beta and options.kl_in == "loss":
        notes.append(
            "grpo.kl 'k1' in the loss has a gradient of mean 0: it holds nothing back; use it with "
            "grpo.kl_in 'reward', or another estimator"
        )
    return notes
