"""The sections of a run's configuration: each field with its meaning and its bounds."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

import tyro

from diffusion_grpo.errors import UsageError
from diffusion_grpo.fields import Section
from diffusion_grpo.sampling import SamplingDefaults

# Flags with a short form; each is declared again at its field.
SHORT_FLAGS = ("--model", "--prompts", "--reward", "--output", "--iterations", "--seed")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """What is trained."""

    section_name: ClassVar[str] = "model"

    pretrained: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "shapes-diffusion"
    """Checkpoint in the Diffusers layout: a directory, an embedded name, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; None takes its main branch."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16; None takes those without one."""
    clip_skip: int = 0
    """Layers of the text encoders to skip for the prompts, as Diffusers counts them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the models; trained parameters and log-probs stay float32."""
    trainable: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter on the UNet, or all of its parameters."""
    lora_rank: int = 8
    """Rank r of the adapter's matrices."""
    lora_alpha: float = 8.0
    """Scale of the adapter: its output is multiplied by alpha / r."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", r"to_out\.0")
    """Regular expressions; a projection whose dotted path ends in a match gets an adapter."""
    train_text_encoder: bool = False
    """Train adapters of the text encoders too, of the same rank and scale; needs trainable lora."""
    text_encoder_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """As lora_targets, of the text encoders."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        super().__post_init__()
        self.require(bool(self.pretrained.strip()), "pretrained", "a directory, name or hub id")
        self.require_non_negative("clip_skip")
        self.require_positive("lora_rank", "lora_alpha")
        self.require(
            self.trainable == "lora" or not self.train_text_encoder,
            "train_text_encoder",
            "False with model.trainable = 'full': text encoders are trained by adapters alone, so "
            "that --model.trainable lora goes with it",
        )
        for name in ("lora_targets", "text_encoder_targets"):
            targets = getattr(self, name)
            self.require(bool(targets), name, "at least one pattern")
            for pattern in targets:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UsageError(
                        f"model.{name} has {pattern!r}; expected a regular expression ({error})"
                    ) from None


@dataclasses.dataclass(frozen=True)
class PromptsConfig(Section):
    """Which prompts are trained on and which are held out."""

    section_name: ClassVar[str] = "prompts"

    train: Annotated[str, tyro.conf.arg(aliases=["--prompts"])] = "shapes"
    """Prompt list: a name, a .txt, .jsonl, .csv, .parquet or .yaml file, or a template."""
    heldout: str | None = "shapes_heldout"
    """Prompt list for evaluation, never trained on; None takes heldout_share of the training list,
    and so does replacing the training list of a preset or file without giving this one."""
    heldout_share: float = 0.0
    """Share of the training list to hold out if heldout is None; 0 evaluates on what is trained."""

    def __post_init__(self) -> None:
        """Reject empty names."""
        super().__post_init__()
        for name in ("train", "heldout"):
            value = getattr(self, name)
            self.require(value is None or bool(value.strip()), name, "a name or a file")
        self.require(0 <= self.heldout_share < 1, "heldout_share", "a number from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """How images are sampled for training."""

    section_name: ClassVar[str] = "rollout"

    prompts_per_iteration: int = 8
    """P, prompts an iteration."""
    images_per_prompt: int = 8
    """G, images of one prompt (a group); 2 or more, since rewards are compared within it."""
    num_steps: int = 20
    """T, denoising steps an image."""
    eta: float = 1.0
    """η, the noise of a step: 0 is deterministic DDIM (no log-prob), 1 ancestral sampling."""
    guidance_scale: float = SamplingDefaults.guidance_scale
    """s, classifier-free guidance in sampling, update and evaluation; 1 switches it off."""
    negative_prompt: str = ""
    """Text of the unconditional half of the guidance."""
    microbatch: int = 16
    """Images sampled at a time; divides P x G."""
    height: int | None = None
    """Image height in pixels; None takes the checkpoint's."""
    width: int | None = None
    """Image width in pixels; None takes the checkpoint's."""
    storage_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the recorded latents; a sample is cast to it before its log-prob is taken."""
    same_initial_noise: bool = False
    """Start all images of a group from the same noise x_T."""
    window_size: int | None = None
    """Noise and gradient only in this many consecutive steps, DDIM elsewhere; None is all steps."""
    window_start: int = 0
    """First step of the window, 0 being the noisiest."""
    window_every: int = 0
    """Iterations after which the window moves on by one step, around the end; 0 never."""

    def __post_init__(self) -> None:
        """Reject values that no rollout can use."""
        super().__post_init__()
        self.require_positive("prompts_per_iteration", "num_steps", "microbatch")
        self.require(
            self.images_per_prompt >= 2,
            "images_per_prompt",
            "2 or more, since GRPO compares the images of one prompt with each other",
        )
        self.require(0 <= self.eta <= 1, "eta", "a number from 0 to 1")
        self.require_non_negative("guidance_scale", "window_start", "window_every")
        self.require_positive("window_size")
        for name in ("height", "width"):
            value = getattr(self, name)
            self.require(value is None or (value > 0 and value % 8 == 0), name, "a multiple of 8")
        if (self.height is None) != (self.width is None):
            raise UsageError(
                f"rollout.height is {self.height} and rollout.width is {self.width}; expected "
                "both or neither"
            )

    @property
    def num_images(self) -> int:
        """B = P x G, the images of one iteration."""
        return self.prompts_per_iteration * self.images_per_prompt


@dataclasses.dataclass(frozen=True)
class RewardConfig(Section):
    """What images are scored by."""

    section_name: ClassVar[str] = "reward"

    rewards: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--reward"])] = ("clip=1.0",)
    """NAME or NAME=WEIGHT each: a built-in reward, FILE.py[:FUNCTION], package.module:name, or the
    URL of a reward server."""
    options: tuple[str, ...] = ()
    """NAME.OPTION=VALUE each, such as clip.model=shapes-clip: an option of one of the rewards."""
    combine: Literal["weighted", "min", "ensemble"] = "weighted"
    """One number of several rewards, each times its weight: their sum, the smallest of them, or
    their mean less pessimism times their standard deviation."""
    pessimism: float = 1.0
    """κ of the ensemble: how much the rewards' disagreement about an image counts against it."""
    on_failure: tuple[str, ...] = ()
    """What to do when a reward fails, [NAME=]POLICY each: stop (save a checkpoint and stop; the
    default), retry=N (call it again up to N times, then stop), or drop-group (leave the groups
    that it fails on out of the update)."""
    max_dropped: float = 0.25
    """The share of an iteration's groups past which dropping them stops the run too."""
    cache: tuple[str, ...] = ()
    """Names of rewards that score equal images with equal prompts only once."""

    def __post_init__(self) -> None:
        """Reject a missing reward, malformed options and shares that no run can use."""
        super().__post_init__()
        self.require(bool(self.rewards), "rewards", "at least one reward, such as 'clip=1.0'")
        self.require(all(spec.strip() for spec in self.rewards), "rewards", "no empty name")
        for option in self.options:
            if not re.fullmatch(r".+\.\w+=.*", option):
                raise UsageError(
                    f"reward.options has {option!r}; expected NAME.OPTION=VALUE, such as "
                    "'clip.model=shapes-clip'"
                )
        self.require_non_negative("pessimism")
        self.require(0 <= self.max_dropped < 1, "max_dropped", "a share from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class GRPOOptions(Section):
    """Advantages, the policy-gradient loss and its KL."""

    section_name: ClassVar[str] = "grpo"

    algorithm: Literal["grpo", "nft"] = "grpo"
    """GRPO on the steps' log-probs, or DiffusionNFT's forward-process loss (see --nft)."""
    advantage: Literal["group", "group_mean", "group_global_std", "leave_one_out", "running"] = (
        "group"
    )
    """A: (r - mean)/(std + eps) in the group; mean only; batch std; RLOO; the prompt's history."""
    advantage_eps: float = 1e-8
    """eps of the advantage, in units of the reward."""
    advantage_clip: float = 5.0
    """Advantages are clipped to this many standard deviations, both ways."""
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
    microbatch: int = 8
    """Images a gradient is taken of at a time; divides the images learned from."""
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
    """The learning rate after the warm-up: constant, or down to the end of the run."""
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


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    """The same held-out images before, during and after training."""

    section_name: ClassVar[str] = "eval"

    every: int = 0
    """Iterations between evaluations; 0 evaluates only before and after."""
    num_prompts: int = 64
    """Prompts evaluated on: the first of the held-out list, all of it if it is shorter."""
    images_per_prompt: int = 1
    """Images of each."""
    num_steps: int = SamplingDefaults.num_steps
    """Denoising steps."""
    eta: float = 0.0
    """η of the sampler; 0 is deterministic DDIM, what a user of the model will run."""
    seed: int = 0
    """Seed of the initial noise, independent of run.seed, so that runs can be compared."""
    gold: tuple[str, ...] = ()
    """Rewards that training never sees, in the form of reward.rewards."""
    stochastic: bool = False
    """Also measure the KL to the reference, along trajectories of the training sampler."""
    keep_best: bool = True
    """Keep the model with the best held-out mean under best/: gold if there is one, else total."""
    patience: int = 0
    """Stop after so many evaluations in a row in which gold fell and the reward rose; 0 never."""

    def __post_init__(self) -> None:
        """Reject values that no evaluation can use."""
        super().__post_init__()
        self.require_non_negative("every", "seed", "patience")
        self.require(
            not self.patience or bool(self.gold and self.every),
            "patience",
            "0, since without eval.gold and eval.every there is nothing to watch",
        )
        self.require_positive("num_prompts", "images_per_prompt", "num_steps")
        self.require(0 <= self.eta <= 1, "eta", "a number from 0 to 1")
        self.require(all(spec.strip() for spec in self.gold), "gold", "no empty name")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """How a run is laid out over its devices; images are divided over both axes."""

    section_name: ClassVar[str] = "mesh"

    data: int | None = None
    """Devices along the axis that only images are divided over; None takes all that fsdp leaves."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are divided over, for less memory of each."""

    def __post_init__(self) -> None:
        """Reject values that no mesh can have."""
        super().__post_init__()
        self.require_positive("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """How long, from which seed, and where to."""

    section_name: ClassVar[str] = "run"

    output: Annotated[str, tyro.conf.arg(aliases=["--output"])] = "runs/grpo"
    """Directory of the run; it must not hold another one."""
    iterations: Annotated[int, tyro.conf.arg(aliases=["--iterations"])] = 100
    """Iterations: a rollout and its updates each."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 0
    """Seed of every random draw of training."""
    save_every: int = 0
    """Iterations between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept, beside the one with the best held-out mean."""
    max_nonfinite: int = 10
    """Updates in a row that may be skipped, loss or gradient not being finite, before it stops."""
    sample_every: int = 10
    """Iterations between picture grids under samples/; 0 writes them only before and after."""
    log_every: int = 1
    """Iterations between lines of metrics.jsonl."""
    report: bool = True
    """Write report.html, refreshed about once a minute."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Write TensorBoard event files under tensorboard/; auto: where the package is installed."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases (the extra wandb)."""

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        super().__post_init__()
        self.require(bool(self.output.strip()), "output", "a directory")
        self.require_positive("iterations", "log_every", "keep_checkpoints")
        self.require_non_negative("seed", "save_every", "sample_every", "max_nonfinite")
