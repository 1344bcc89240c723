"""What a run prepares once: its directory, the model, the optimizer, and the compiled pieces."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_grpo.config import Config, OptimConfig, to_yaml
from diffusion_grpo.errors import UsageError
from diffusion_grpo.pretrained import DTYPES, StableDiffusion
from diffusion_grpo.prompts import Prompt
from diffusion_grpo.reward import RewardResult, RewardSet, Scoring
from diffusion_grpo.rollout import Trajectory, sample
from diffusion_grpo.schedule import Schedule
from diffusion_grpo.update import reference_means


def check_directory(config: Config, resume: bool) -> Path:
    """Find out whether a run can be written to its directory, without leaving anything there.

    Raises:
        UsageError: it holds a run and this is no resume, or none and this is one; it cannot
            be written.
    """
    directory = Path(config.run.output)
    held = (directory / "config.yaml").is_file()
    mend = "choose another with --run.output"
    if resume and not held:
        raise UsageError(f"{directory} holds no run to resume: config.yaml is not there")
    if not resume and held:
        raise UsageError(
            f"output directory {directory} holds another run; {mend}, or go on with it by "
            f"`diffusion-grpo train --resume {directory}`"
        )
    if not resume and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"output directory {directory} holds other files; {mend}")
    parent = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"output directory {directory} cannot be written: {parent} refuses; {mend}"
        )
    return directory


def check_prompts(
    config: Config,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    rewards: RewardSet,
    gold: RewardSet | None,
) -> None:
    """Find out whether the rewards can judge what they will be asked to.

    Raises:
        UsageError: a reward cannot judge a prompt, or compares the images of one where there is
            only one.
    """
    evaluated = heldout[: config.eval.num_prompts]
    training = (prompts, config.rollout.images_per_prompt, "rollout.images_per_prompt")
    evaluation = (evaluated, config.eval.images_per_prompt, "eval.images_per_prompt")
    for judges, (chosen, group_size, what) in (
        (rewards, training),
        (rewards, evaluation),
        *([(gold, evaluation)] if gold is not None else []),
    ):
        texts, metadata = [p.text for p in chosen], [p.metadata for p in chosen]
        judges.check(texts, metadata, group_size=group_size, what=what)


def make_directory(config: Config, directory: Path) -> None:
    """Make the run directory with its `config.yaml`, if it is not there.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        (directory / "samples").mkdir(parents=True, exist_ok=True)
        if not (directory / "config.yaml").is_file():
            (directory / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise UsageError(
            f"output directory {directory} cannot be written ({error.strerror}); choose another "
            "with --run.output"
        ) from None


def load_model(config: Config, source: Path) -> StableDiffusion:
    """Load the pipeline: frozen parts in the compute dtype, trained parameters in float32."""
    dtype = DTYPES[config.model.dtype]
    full = config.model.trainable == "full"
    model = StableDiffusion.from_pretrained(
        source,
        dtype=dtype,
        param_dtype=dtype,
        unet_param_dtype=jnp.float32 if full else dtype,
    )
    model.unet.gradient_checkpointing = config.model.gradient_checkpointing
    return model


def lora_options(config: Config) -> dict[str, Any] | None:
    """Return the adapter's options, or None where all parameters are trained."""
    if config.model.trainable == "full":
        return None
    return {
        "targets": config.model.lora_targets,
        "rank": config.model.lora_rank,
        "alpha": config.model.lora_alpha,
    }


def make_optimizer(
    options: OptimConfig, updates_per_rollout: int
) -> tuple[optax.GradientTransformation, Any]:
    """Return AdamW behind a clip of the global gradient norm, and iteration → learning rate."""

    def rate(step: Any) -> Any:
        ramp = (step // updates_per_rollout + 1) / (options.warmup_iterations + 1)
        return options.learning_rate * jnp.minimum(1.0, ramp)

    optimizer = optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adamw(
            rate,
            b1=options.beta1,
            b2=options.beta2,
            eps=options.eps,
            weight_decay=options.weight_decay,
        ),
    )
    return optimizer, lambda iteration: float(rate(iteration * updates_per_rollout))


def make_rollout(config: Config, denoiser: Any) -> Any:
    """Compile the sampler of one microbatch, and run it over all images of an iteration.

    `on_chunk` of the function returned is called with each microbatch's trajectory as soon as it is
    on its way, before the next one is begun.
    """
    reduction = config.grpo.log_prob_reduction
    storage = DTYPES[config.rollout.storage_dtype]

    @jax.jit
    def chunk(
        trained: Any, frozen: Any, schedule: Schedule, noise: Any, keys: Any, conditioning: Any
    ) -> Trajectory:
        return sample(
            denoiser(trained, frozen),
            schedule,
            noise,
            keys,
            conditioning,
            reduction=reduction,
            storage_dtype=storage,
        )

    def draw(
        trained: Any,
        frozen: Any,
        schedule: Schedule,
        noise: Any,
        keys: Any,
        conditioning: Any,
        *,
        on_chunk: Callable[[Trajectory], None] | None = None,
    ) -> Trajectory:
        size = config.rollout.microbatch
        embeddings, negative = conditioning
        parts = []
        for i in range(0, len(noise), size):
            rows = slice(i, i + size)
            part = (noise[rows], keys[rows], (embeddings[rows], negative))
            parts.append(chunk(trained, frozen, schedule, *part))
            if on_chunk is not None:
                on_chunk(parts[-1])
        return Trajectory(
            jnp.concatenate([p.latents for p in parts], axis=1),
            parts[0].timesteps,
            jnp.concatenate([p.log_probs for p in parts], axis=1),
        )

    return draw


def make_reference(config: Config, denoiser: Any) -> Any:
    """Compile the reference's means of the recorded steps, a microbatch of images at a time."""
    compiled = jax.jit(
        lambda reference, frozen, *args: reference_means(denoiser(reference, frozen), *args)
    )

    def refer(
        reference: Any,
        frozen: Any,
        schedule: Schedule,
        latents: Any,
        conditioning: Any,
        active: Any,
    ) -> Any:
        embeddings, negative = conditioning
        parts = []
        for i in range(0, latents.shape[1], config.rollout.microbatch):
            rows = slice(i, i + config.rollout.microbatch)
            part = (latents[:, rows], (embeddings[rows], negative))
            parts.append(compiled(reference, frozen, schedule, *part, active))
        return jnp.concatenate(parts, axis=1)

    return refer


def decode_and_score(decode: Any, images: list[Any], scoring: Scoring, part: Trajectory) -> None:
    """Decode what was just drawn, keep the images, and hand them to the rewards."""
    images.append(decode(part.final))
    scoring.add(images[-1])


def kept_advantages(
    advantages: Callable[[jax.Array], jax.Array], result: RewardResult
) -> jax.Array:
    """Return the advantages of an iteration; those of a dropped group, which has none, are 0.

    Args:
        advantages: totals of whole groups to their advantages.
        result: what the images scored.
    """
    (rows,) = np.nonzero(result.kept)
    found = advantages(jnp.asarray(result.total[rows]))
    return (
        found
        if len(rows) == len(result.total)
        else jnp.zeros(len(result.total)).at[rows].set(found)
    )


def decode_chunks(decode: Any, latents: jax.Array, size: int) -> jax.Array:
    """Decode `size` images at a time."""
    return jnp.concatenate([decode(latents[i : i + size]) for i in range(0, len(latents), size)])
