"""The sections of a run's configuration: each field with its meaning and its bounds.

Those of the loss and the optimizer are in `learning_sections`.
"""

from __future__ import annotations

import dataclasses
import os
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
    """Checkpoint in the Diffusers layout: a directory, an embedded name, or a hub id. A command
    also takes a run, for the model that it trained, and RUN@best."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; None takes its main branch. A run writes down the
    commit, and goes on with it."""
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
    """Regular expressions; a linear layer or convolution whose path ends in a match is adapted."""
    train_text_encoder: bool = False
    """Train adapters of the text encoders too, of the same rank and scale; needs trainable lora."""
    text_encoder_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """As lora_targets, of the text encoders."""
    gradient_checkpointing: bool | None = False
    """Recompute each block's activations in the backward pass: less memory, more time. None
    recomputes where they would not fit, or leave room for too few images at a time."""

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
    """Share of the training list held out if heldout is None; 0 evaluates on training prompts."""

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
    """s, classifier-free guidance in sampling, update and evaluation; up to 1 it is off."""
    negative_prompt: str = ""
    """Text of the unconditional half of the guidance."""
    microbatch: int | None = 16
    """Images sampled at a time; divides P x G. None takes what the device's memory has room for."""
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
    def images_at_once(self) -> int:
        """The microbatch, once it is chosen.

        Raises:
            UsageError: it is left open; see `fitting.fitted`.
        """
        return self.chosen("microbatch")

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
    """NAME.OPTION=VALUE each, such as clip.model=shapes-clip; laid over those of a preset."""
    combine: Literal["weighted", "min", "ensemble"] = "weighted"
    """One number of several rewards, each times its weight: their sum, the smallest of them, or
    their mean less pessimism times their standard deviation."""
    pessimism: float = 1.0
    """κ of the ensemble: how much the rewards' disagreement about an image counts against it."""
    on_failure: tuple[str, ...] = ()
    """What to do when a reward fails, [NAME=]POLICY each: stop (save a checkpoint and stop; the
    default), retry=N (call it again up to N times, then stop), or drop-group (the groups that it
    fails on get advantages of 0; what holds the policy near another one still counts them)."""
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
            if not re.fullmatch(r".+\.\w+=.*", option, re.DOTALL):
                raise UsageError(
                    f"reward.options has {option!r}; expected NAME.OPTION=VALUE, such as "
                    "'clip.model=shapes-clip'"
                )
        self.require_non_negative("pessimism")
        self.require(0 <= self.max_dropped < 1, "max_dropped", "a share from 0 to below 1")


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
    """Rewards that training never sees, NAME[=WEIGHT] each; a weight below 0: less is better."""
    stochastic: bool = False
    """Also measure the KL to the reference, with the rollout's T and η, noise in all steps."""
    keep_best: bool = True
    """Keep the model with the best held-out mean under best/: gold if there is one, else total."""
    patience: int = 0
    """Stop after this many evaluations in a row with gold below its best,
    and the trained reward above what it was at that best; 0 never."""

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
    """Directory of the run, ~ for the home folder; it must not hold another one."""
    iterations: Annotated[int, tyro.conf.arg(aliases=["--iterations"])] = 100
    """Iterations, each a rollout and its updates."""
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
    """Iterations between lines of metrics.jsonl; the last one has a line, too."""
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
        # A shell leaves the ~ of --output=~/runs/x, and nothing else expands that of a YAML file.
        object.__setattr__(self, "output", os.path.expanduser(self.output))
        self.require_positive("iterations", "log_every", "keep_checkpoints")
        self.require_non_negative("seed", "save_every", "sample_every", "max_nonfinite")
