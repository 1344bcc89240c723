"""Measure the embedded models on held-out captions: `python -m diffusion_grpo.shapes.measure`.

- autoencoder: share of pictures that the exact verifier accepts before and after a round trip
- CLIP: share of pictures whose caption scores above five false ones that differ by one change
- pipeline: share of pictures that show exactly what their prompt says, by task and guidance
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_grpo.images import image_grid, save_image
from diffusion_grpo.pipeline import generate, make_decoder
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.reward_loading import load_reward
from diffusion_grpo.shapes.captions import captions, hard_negatives
from diffusion_grpo.shapes.render import render
from diffusion_grpo.shapes.scenes import TASKS, sample_scenes
from diffusion_grpo.shapes.verify import verify


def measure_autoencoder(model: StableDiffusion, n: int, seed: int) -> dict[str, float]:
    """Return the share of held-out scenes accepted as rendered, and after a round trip."""
    scenes = sample_scenes(np.random.default_rng(seed), n, split="heldout")
    images, texts = render(scenes), captions(scenes)
    decode, scaling = make_decoder(model), model.vae.config.scaling_factor
    again = [
        np.asarray(decode(scaling * model.vae.encode(jnp.asarray(x, jnp.float32) / 127.5 - 1)[0]))
        for x in np.array_split(images, -(-n // 64))
    ]
    error = np.abs(np.concatenate(again).astype(float) - images).mean()
    return {
        "rendered": float(verify(images, texts).passed.mean()),
        "round_trip": float(verify(np.concatenate(again), texts).passed.mean()),
        "mean_error_of_255": float(error),
    }


def measure_clip(clip: str, n: int, seed: int, choices: int = 6) -> dict[str, float]:
    """Return how often the true caption of a held-out scene scores highest, by task."""
    reward = load_reward("clip", {"model": clip}).function
    rng = np.random.default_rng(seed)
    result = {}
    for task in TASKS:
        scenes = sample_scenes(rng, n, split="heldout", tasks=[task])
        options = np.array(
            [captions(scenes), *zip(*hard_negatives(scenes, rng, choices - 1), strict=True)]
        ).T
        images = np.repeat(render(scenes), choices, axis=0)
        device = jnp.asarray(images, jnp.float32) / 255
        scores = np.asarray(reward(device, options.ravel().tolist(), [{}] * len(images)))
        scores = scores.reshape(n, choices)
        result[task] = float((scores[:, 0] > scores[:, 1:].max(axis=1)).mean())
    return result | {"mean": float(np.mean(list(result.values())))}


def measure_pipeline(
    model: StableDiffusion, n: int, guidance_scale: float, num_steps: int, seed: int
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """Return the share of right pictures of the held-out prompts, by task, with the pictures."""
    prompts = load_prompts("shapes_heldout")[:n]
    texts = [p.text for p in prompts]
    images = generate(
        model,
        texts,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        prompt_index=range(len(texts)),
        image_index=[0] * len(texts),
        batch_size=64,
    )
    passed = verify(images, texts).passed
    tasks = np.array([p.metadata["task"] for p in prompts])
    result = {task: float(passed[tasks == task].mean()) for task in TASKS if (tasks == task).any()}
    return result | {"all": float(passed.mean())}, images, texts


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shapes-diffusion")
    parser.add_argument("--clip", default="shapes-clip")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 3.0, 5.0])
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--num-prompts", type=int, default=360)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grid", type=Path, help="write a grid of the last guidance scale's pictures"
    )
    args = parser.parse_args(argv)
    model = StableDiffusion.from_pretrained(args.model)
    report: dict[str, Any] = {
        "autoencoder": measure_autoencoder(model, 1024, args.seed),
        "clip": measure_clip(args.clip, 256, args.seed),
        "pipeline": {},
    }
    for scale in args.guidance:
        shares, images, texts = measure_pipeline(
            model, args.num_prompts, scale, args.num_steps, args.seed
        )
        report["pipeline"][f"guidance {scale:g}"] = shares
        if args.grid:
            save_image(args.grid, image_grid(images[:48], texts[:48], columns=8))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
