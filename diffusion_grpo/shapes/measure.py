"""Measure the embedded models on held-out captions: `python -m diffusion_grpo.shapes.measure`.

- autoencoder: share of pictures that the exact verifier accepts before and after a round trip
- CLIP: share of pictures whose caption scores above five false ones that differ by one change
- pipeline: share of pictures that show exactly what their prompt says, by task and guidance
- places: of the pictures whose prompt states a place, the share with the objects asked for, and of
  these the share at the right place (chance: a fourth)
- diversity: mean CLIP distance of a prompt's pictures, of those that are right, and of scenes that
  the prompt is true of
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.errors import UsageError
from diffusion_grpo.grids import image_grid
from diffusion_grpo.images import check_image_path, save_image
from diffusion_grpo.pipeline import generate, make_decoder
from diffusion_grpo.pretrained import StableDiffusion, check_clip
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


def draw(
    model: StableDiffusion,
    indices: Sequence[int],
    num_images: int,
    guidance_scale: float,
    num_steps: int,
    seed: int,
) -> tuple[np.ndarray, list[str]]:
    """Draw `num_images` of each of some held-out prompts, given by their places in the list.

    Returns:
        The images, uint8 `[len(indices) · num_images, H, W, 3]`, and the prompt of each.
    """
    prompts = load_prompts("shapes_heldout")
    texts = [prompts[i].text for i in indices for _ in range(num_images)]
    images = generate(
        model,
        texts,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        prompt_index=[i for i in indices for _ in range(num_images)],
        image_index=list(range(num_images)) * len(indices),
        batch_size=64,
    )
    return images, texts


def measure_pipeline(
    model: StableDiffusion, n: int, guidance_scale: float, num_steps: int, seed: int
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """Return the share of right pictures of the held-out prompts, by task, with the pictures."""
    prompts = load_prompts("shapes_heldout")[:n]
    images, texts = draw(model, range(len(prompts)), 1, guidance_scale, num_steps, seed)
    passed = verify(images, texts).passed
    tasks = np.array([p.metadata["task"] for p in prompts])
    result = {task: float(passed[tasks == task].mean()) for task in TASKS if (tasks == task).any()}
    return result | {"all": float(passed.mean())}, images, texts


def measure_places(
    model: StableDiffusion, guidance_scale: float, num_steps: int, seed: int, num_images: int = 4
) -> dict[str, float | None]:
    """Return what of the held-out prompts that state a place is drawn right, by part."""
    prompts = load_prompts("shapes_heldout")
    indices = [i for i, p in enumerate(prompts) if p.metadata["task"] == "position"]
    images, texts = draw(model, indices, num_images, guidance_scale, num_steps, seed)
    verdict = verify(images, texts)
    parts = verdict.parts
    objects = parts["shape"] & parts["color"] & parts["count"]
    return {
        "images": len(texts),
        "objects": float(objects.mean()),
        "place_of_those": _mean(parts["position"][objects]),
        "right": float(verdict.passed.mean()),
    }


def true_scenes(texts: Sequence[str], n: int, seed: int, rounds: int = 50) -> np.ndarray:
    """Render `n` random held-out scenes that each caption is true of.

    Returns:
        uint8 `[len(texts), n, H, W, 3]`.

    Raises:
        UsageError: if a caption is so rare that `rounds` draws of 40 000 scenes did not do.
    """
    rng, found = np.random.default_rng(seed), {text: [] for text in texts}
    for _ in range(rounds):
        scenes = sample_scenes(rng, 40_000, split="heldout")
        said = captions(scenes, rng)
        for i, text in enumerate(said):
            if text in found and len(found[text]) < n:
                found[text].append(render(scenes.take(np.array([i])))[0])
        if all(len(images) == n for images in found.values()):
            return np.array([found[text] for text in texts])
    rare = next(text for text, images in found.items() if len(images) < n)
    raise UsageError(
        f"found {len(found[rare])} of {n} held-out scenes that {rare!r} is true of; expected a "
        "caption of prompts/shapes_heldout.txt"
    )


def measure_diversity(
    model: StableDiffusion,
    clip: str,
    scenes: np.ndarray,
    guidance_scale: float,
    num_steps: int,
    seed: int,
) -> dict[str, float | None]:
    """Return mean pairwise CLIP distances within held-out prompts (as of `rewards/diversity.py`).

    Pictures that are wrong are far from those that are right, so that a model that draws more of
    them right has less distance. Therefore also of the pairs that are both right, beside the
    distance of true scenes of the same prompts: `scenes`, `[prompts, images, H, W, 3]`.
    """
    num_prompts, num_images = scenes.shape[:2]
    images, texts = draw(model, range(num_prompts), num_images, guidance_scale, num_steps, seed)
    embedder = CLIPEmbedder.from_pretrained("diversity", clip, 64)
    first, second = np.triu_indices(num_images, 1)

    def distances(images: np.ndarray) -> np.ndarray:
        parts = np.array_split(images, -(-len(images) // 64))
        found = [np.asarray(embedder.images(jnp.asarray(x, jnp.float32) / 255)) for x in parts]
        groups = np.concatenate(found).reshape(num_prompts, num_images, -1)
        return 1 - (groups[:, first] * groups[:, second]).sum(axis=-1)

    drawn = distances(images)
    true = distances(scenes.reshape(images.shape))
    right = verify(images, texts).passed.reshape(num_prompts, num_images)
    both = right[:, first] & right[:, second]
    some = both.any(axis=1)
    of_right = np.array([d[b].mean() for d, b in zip(drawn[some], both[some], strict=True)])
    return {
        "all": float(drawn.mean()),
        "true": float(true.mean()),
        "right": _mean(of_right),
        "true_of_those": _mean(true[some]),
        "prompts_of_those": int(some.sum()),
    }


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
    try:
        if args.grid:
            check_image_path(args.grid)
        for name in ("num_prompts", "num_steps"):
            if (value := getattr(args, name)) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
        if args.grid and not args.guidance:
            raise UsageError(
                "--guidance has no value, so that there are no pictures for --grid; expected one "
                "or more, or no --grid"
            )
        check_clip(args.clip)
        report = measure(args)
    except UsageError as error:
        parser.error(str(error))
    print(json.dumps(report, indent=2))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line asks for; None for what has no mean."""
    model = StableDiffusion.from_pretrained(args.model)
    report: dict[str, Any] = {
        "autoencoder": measure_autoencoder(model, 1024, args.seed),
        "clip": measure_clip(args.clip, 256, args.seed),
        "pipeline": {},
        "places": {},
        "diversity": {},
    }
    prompts = [p.text for p in load_prompts("shapes_heldout")[: args.num_prompts]]
    scenes = true_scenes(prompts, 4, args.seed)
    for scale in args.guidance:
        shares, images, texts = measure_pipeline(
            model, args.num_prompts, scale, args.num_steps, args.seed
        )
        report["pipeline"][f"guidance {scale:g}"] = shares
        report["places"][f"guidance {scale:g}"] = measure_places(
            model, scale, args.num_steps, args.seed
        )
        report["diversity"][f"guidance {scale:g}"] = measure_diversity(
            model, args.clip, scenes, scale, args.num_steps, args.seed
        )
        if args.grid:
            save_image(args.grid, image_grid(images[:48], texts[:48], columns=8))
    return report


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


if __name__ == "__main__":
    main()
