"""The sections of a run's configuration about learning: the loss, its KL, the optimizer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from diffusion_grpo.fields import Section


@dataclasses.dataclass(frozen=True)
class GRPOOptions(Section):
    """Advantages, the policy-gradient loss and its KL."""

    section_name: ClassVar[str] = "grpo"

    algorithm: Literal["grpo", "nft"] = "grpo"
    """GRPO on the steps' log-probs, or DiffusionNFT's forward-process loss (options --nft.*)."""
    advantage: Literal["group", "group_mean", "group_global_std", "leave_one_out", "running"] = (
        "group"
    )
    """A: (r - mean)/(std + eps) in the group; mean only; batch std; RLOO; the prompt's history."""
    advantage_eps: float = 1e-8
    """eps of the advantage, in units of the reward."""
    advantage_clip: float = 5.0
    """Bound on |A|, in standard deviations; with combine = 'advantages', on each reward's own A.
    With nft also the A from which an image counts as all good, and below minus it as all bad."""
    combine: Literal["rewards", "advantages"] = "rewards"
    """Weight and sum several rewards, or the advantages of each of them (GDPO)."""
    running_size: int = 32
    """Rewards of a prompt that advantage = 'running' remembers."""
    running_min: int = 16
    """Rewards of a prompt from which on its own statistics are used, not the batch's."""
    best_and_worst: int | None = None
    """Only this many best and as many worst images of each group are learned from; None is all."""
    ratio: Literal["trajectory", "step"] = "trajectory"
    """ρ: one ratio an image, of the log-probs summed over its steps, or one ratio a step."""
    ratio_base: Literal["old", "reference"] = "old"
    """ρ's denominator: the policy that sampled, or the frozen reference."""
    gamma: float = 1.0
    """γ: a step's advantage is γ^(steps remaining) A, with ratio = 'step'; 1 is no discount."""
    clip_low: float = 1e-4
    """ε_low: ρ below 1 - ε_low gains nothing more; in the units that clip_scale says."""
    clip_high: float = 1e-4
    """ε_high: ρ above 1 + ε_high gains nothing more; in the units that clip_scale says."""
    clip_scale: Literal["auto", "none"] = "auto"
    """auto: clip ranges are for 1 step of 64x64x4 latents, by mean, and are rescaled; none: ρ's."""
    dual_clip: float | None = None
    """c > 1: a bad image's ρ beyond c pulls no more (in the clip ranges' units); None is off."""
    guard: bool = False
    """GRPO-Guard: center each step's ratio and level its spread; with ratio = 'step'."""
    dppo_kl: float | None = None
    """DPPO: no clipping; a step whose KL is above this and that moves outward is dropped."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """A step's log-prob is the mean over the latent's elements, or their sum (the density)."""
    kl: Literal["exact", "k1", "k2", "k3", "flow_grpo", "mse"] = "exact"
    """KL to the reference: of the steps' Gaussians, Schulman's, Flow-GRPO's; mse is for nft."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add β KL to the loss, or subtract it from each image's reward."""
    beta: float = 0.0
    """β, the weight of the KL; 0 leaves it out."""
    kl_target: float | None = None
    """Adapt β, from the one given, so that the KL stays at this; None keeps β."""
    entropy_coeff: float = 0.0
    """Weight of the steps' entropy in the loss; acts only with learn_noise_scale."""
    learn_noise_scale: bool = False
    """Learn a factor of every step's noise, exp(s_t), along with the UNet."""
    step_weights: Literal["uniform", "gain", "given"] = "uniform"
    """w_t of a step's log-prob: 1, the inverse of the step's sensitivity, or given_weights."""
    given_weights: tuple[float, ...] = ()
    """w_t of the T steps, noisiest first, for step_weights = 'given'; 0 leaves a step out."""
    timestep_fraction: float = 1.0
    """Share of the steps that an iteration learns from, drawn anew each time (DanceGRPO)."""
    updates_per_rollout: int = 2
    """Optimizer steps an iteration; at the first ρ is exactly 1, clipping acts from the second."""
    microbatch: int | None = 8
    """Images differentiated at a time; divides the number of images learned from. None takes what
    the device's memory has room for."""
    gradient_steps: int | None = None
    """K of the A steps are differentiated, drawn uniformly, scaled by A/K; None takes all."""
    allow_drift: bool = False
    """Train although log-probs of rollout and update differ by more than the clip range."""

    def __post_init__(self) -> None:
        """Reject values that no update can use."""
        super().__post_init__()
        self.require_positive("advantage_eps", "advantage_clip", "clip_low", "clip_high")
        self.require_positive("running_size", "running_min", "best_and_worst", "dppo_kl")
        self.require(self.running_min <= self.running_size, "running_min", "running_size at most")
        self.require(self.clip_low < 1, "clip_low", "a number between 0 and 1")
        self.require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "more than 1")
        self.require(0 < self.gamma <= 1, "gamma", "a number above 0, at most 1")
        self.require(
            0 < self.timestep_fraction <= 1, "timestep_fraction", "a number above 0, at most 1"
        )
        self.require(all(w >= 0 for w in self.given_weights), "given_weights", "none below 0")
        self.require_non_negative("beta", "entropy_coeff")
        self.require_positive("updates_per_rollout", "microbatch", "gradient_steps", "kl_target")

    @property
    def images_at_once(self) -> int:
        """The microbatch, once it is chosen.

        Raises:
            UsageError: it is left open; see `fitting.fitted`.
        """
        return self.chosen("microbatch")


@dataclasses.dataclass(frozen=True)
class NFTOptions(Section):
    """DiffusionNFT, with grpo.algorithm = 'nft'."""

    section_name: ClassVar[str] = "nft"

    beta: float = 0.5
    """β: how far the positive and the negative policy are from the old one, old ± β (new - old)."""
    timesteps: int = 4
    """Timesteps an image is noised to in an update, drawn from those of the sampler."""
    decay: float = 0.9
    """Decay of the old policy, an average of the trained ones, once it has risen."""
    decay_rise: float = 0.02
    """The decay rises by this an iteration, from 0; the old policy follows closely at first."""

    def __post_init__(self) -> None:
        """Reject values that the loss cannot use."""
        super().__post_init__()
        self.require_positive("beta", "timesteps", "decay_rise")
        self.require(0 <= self.decay < 1, "decay", "a number from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """The optimizer, its learning rate, and the average of what it trains."""

    section_name: ClassVar[str] = "optim"

    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    """adafactor keeps less state; lion wants a learning rate 3 to 10 times smaller."""
    learning_rate: float = 3e-4
    """Step size after the warm-up; about 3e-4 for LoRA and 1e-5 for a full large UNet."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling until the end of the run."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of a linear or cosine schedule."""
    warmup_iterations: int = 0
    """Iterations over which the learning rate rises linearly from 0."""
    beta1: float = 0.9
    """Decay of the first moment (adamw, lion)."""
    beta2: float = 0.999
    """Decay of the second moment (adamw), of the momentum (lion: 0.99)."""
    eps: float = 1e-8
    """Added to the root of the second moment (adamw)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, times the learning rate."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """Decay all trained parameters, or those of two axes or more: no biases, no norms."""
    max_grad_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    ema_decay: float | None = None
    """Average the trained parameters over the updates, to evaluate and export; None is off."""

    def __post_init__(self) -> None:
        """Reject values that no optimizer can use."""
        super().__post_init__()
        self.require_positive("learning_rate", "eps", "max_grad_norm")
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "a number from 0 to below 1")
        self.require_non_negative("weight_decay", "warmup_iterations", "final_learning_rate")
        self.require(
            self.final_learning_rate <= self.learning_rate,
            "final_learning_rate",
            f"at most learning_rate, {self.learning_rate}",
        )
        self.require(
            not self.final_learning_rate or self.schedule != "constant",
            "final_learning_rate",
            "0, or schedule = 'linear' or 'cosine', since a constant one has no end",
        )
        ema = self.ema_decay
        self.require(ema is None or 0 < ema < 1, "ema_decay", "a number between 0 and 1, or None")
