r"""How much of an iteration's gradient is signal: the ratio that decides how fast a run can learn.

    python benchmarks/gradient_noise.py demo --gradients 28
    python benchmarks/gradient_noise.py demo --grpo.algorithm nft --grpo.kl mse \
        --grpo.step-weights uniform

At the checkpoint's own parameters, the gradients g_1 … g_n of n iterations with different prompts
and noise are independent draws of one mean s plus noise. Two of them multiply to |s|² on average,
so that S = mean over i ≠ j of g_i · g_j estimates |s|² without bias, mean |g_i|² − S the noise's
energy, and their quotient the signal-to-noise ratio of one iteration; that of k times the images is
k times as large. It is given for the gradient itself, and for each element divided by its root mean
square, which is what Adam sums up. Any flag of `train` may follow; nothing is trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from diffusion_grpo.conditioning import by_rows_of, encode_prompts
from diffusion_grpo.config import Config, load_config
from diffusion_grpo.learner import image_advantages, kl_penalty
from diffusion_grpo.microbatches import decode_chunks
from diffusion_grpo.pipeline import make_decoder
from diffusion_grpo.preparation import load_model
from diffusion_grpo.pretrained import local_directory
from diffusion_grpo.prompts import load_prompts, prompt_batch
from diffusion_grpo.reward import RewardSet
from diffusion_grpo.rollout import image_keys, initial_noise
from diffusion_grpo.train import lay_out, make_policy_and_learner


def signal_to_noise(gradients: Float[np.ndarray, "n parameters"]) -> float:
    """Return S/(mean |g_i|² − S) of n ≥ 2 independent gradients; below 0 by chance alone."""
    n = len(gradients)
    total, energy = gradients.sum(axis=0, dtype=np.float64), float(np.square(gradients).sum())
    signal = (float(total @ total) - energy) / (n * (n - 1))
    return signal / (energy / n - signal)


def by_element(gradients: Float[np.ndarray, "n parameters"]) -> Float[np.ndarray, "n parameters"]:
    """Return every element divided by its root mean square over the gradients; 0 where it is 0."""
    size = np.sqrt(np.square(gradients).mean(axis=0))
    return gradients / np.where(size > 0, size, 1)


def measure(config: Config, count: int) -> tuple[Float[np.ndarray, "n parameters"], float]:
    """Return the gradients of `count` iterations at the checkpoint's parameters, and their seconds.

    Read off the optimizer: after one step from nothing, with β₁ = 0 and no clipping, AdamW's first
    moment is the gradient.
    """
    optim = dataclasses.replace(config.optim, optimizer="adamw", beta1=0.0, max_grad_norm=1e30)
    grpo = dataclasses.replace(config.grpo, updates_per_rollout=1)
    config = dataclasses.replace(config, optim=optim, grpo=grpo)
    config.validate()
    rollout, seed = config.rollout, config.run.seed
    model = load_model(config, local_directory(config.model.pretrained))
    policy, learner, shape = make_policy_and_learner(config, model)
    decode = make_decoder(model)
    rewards = RewardSet.load(config.training_rewards(), **config.reward_settings())
    prompts = load_prompts(config.prompts.train)
    gradients, seconds = [], []
    progress = Console(stderr=True)
    for iteration in track(range(count), description="gradients", console=progress):
        began = time.perf_counter()
        batch = prompt_batch(prompts, seed, iteration, rollout.prompts_per_iteration)
        index, texts, metadata, group = lay_out(batch, rollout.images_per_prompt)
        encoded = encode_prompts(
            model,
            [prompt.text for _, prompt in batch],
            negative_prompt=rollout.negative_prompt,
            shape=shape,
            clip_skip=config.model.clip_skip,
            tokens=policy.reads_tokens,
        )
        rows = np.repeat(np.arange(len(batch)), rollout.images_per_prompt)
        first = np.zeros_like(group) if rollout.same_initial_noise else group
        noise = initial_noise(image_keys(seed, iteration, index, first, "initial_noise"), shape)
        state = learner.init(len(prompts))
        drawn = learner.sample(
            state,
            iteration,
            noise,
            image_keys(seed, iteration, index, group, "step_noise"),
            by_rows_of(encoded, rows),
        )
        images = decode_chunks(decode, drawn.final, rollout.microbatch)
        result = rewards(images, texts, metadata, group_size=rollout.images_per_prompt)
        advantages, _ = image_advantages(
            config.grpo,
            result.scores,
            result.total,
            rewards.weights,
            penalty=kl_penalty(state, drawn),
            kept=result.kept,
            group_size=rollout.images_per_prompt,
            prompt_index=index,
            history=state.history,
        )
        keys = image_keys(seed, iteration, index, group, "loss")
        state, _ = learner.learn(state, drawn, advantages, iteration, keys)
        (moments,) = (part for part in state.train.opt_state if hasattr(part, "mu"))
        leaves = jax.tree.leaves(moments.mu)
        gradients.append(np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves]))
        seconds.append(time.perf_counter() - began)
    return np.stack(gradients), float(np.median(seconds))


def main() -> None:
    """Parse the command line, measure, and print a line or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", help="a preset, or a YAML file")
    parser.add_argument("--gradients", type=int, default=24, help="n; 2 or more")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, flags = parser.parse_known_args()
    if options.gradients < 2:
        parser.error(f"--gradients is {options.gradients}; expected 2 or more")
    config = load_config(options.preset, flags)
    gradients, seconds = measure(config, options.gradients)
    found = {
        "images": config.rollout.num_images,
        "gradients": options.gradients,
        "signal_to_noise": signal_to_noise(gradients),
        "signal_to_noise_by_element": signal_to_noise(by_element(gradients)),
        "seconds": seconds,
    }
    if options.json:
        json.dump(found, sys.stdout)
        return
    print(
        f"an iteration of {found['images']} images, {found['seconds']:.1f} s: signal to noise "
        f"{found['signal_to_noise']:.4f}, by element {found['signal_to_noise_by_element']:.4f} "
        f"({found['gradients']} gradients)"
    )


if __name__ == "__main__":
    main()
