"""A run directory as training leaves it, with rendered scenes for pictures: no model needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from diffusion_grpo.config import load_config, to_yaml
from diffusion_grpo.events import record_event
from diffusion_grpo.gallery import Gallery
from diffusion_grpo.metrics import MetricsLog
from diffusion_grpo.shapes.captions import captions
from diffusion_grpo.shapes.render import render
from diffusion_grpo.shapes.scenes import sample_scenes
from diffusion_grpo.stats import diversity, monitor

HOSTILE = (
    "a red circle <script>window.hacked = 1</script><img src=x onerror='window.hacked=1'> &amp;"
)


def record_run(
    directory: Path,
    *,
    iterations: int = 30,
    prompts: int = 8,
    group: int = 8,
    evaluate_every: int = 10,
    heldout: int = 24,
    seed: int = 0,
    finished: bool = True,
) -> Path:
    """Write `config.yaml`, `metrics.jsonl`, the gallery and `evaluation.json` of a run."""
    directory.mkdir(parents=True)
    flags = [
        *("--run.output", str(directory), "--iterations", str(iterations)),
        *("--reward", "clip", "--eval.gold", "shapes"),
        *("--rollout.prompts-per-iteration", str(prompts)),
        *("--rollout.images-per-prompt", str(group), "--grpo.best-and-worst", "None"),
    ]
    (directory / "config.yaml").write_text(to_yaml(load_config("demo", flags)))
    rng = np.random.default_rng(seed)
    gallery = Gallery(directory)
    scenes = sample_scenes(rng, max(heldout, prompts * group), split="all")
    pictures, texts = render(scenes), captions(scenes)
    if pictures.dtype != np.uint8:
        pictures = (255 * pictures).round().clip(0, 255).astype(np.uint8)
    texts[1] = HOSTILE

    def drawn(count: int, progress: float) -> np.ndarray:
        """The rendered scenes, less noisy the further the run is."""
        noise = rng.normal(0, 90 * (1 - progress) + 10, (count, *pictures.shape[1:]))
        return (pictures[:count] + noise).clip(0, 255).astype(np.uint8)

    def evaluation(done: int) -> dict[str, float]:
        progress = done / iterations
        images = drawn(heldout, progress)
        clip = 0.5 + 0.2 * progress + rng.normal(0, 0.03, heldout)
        gold = rng.random(heldout) * (0.3 + 0.4 * progress)
        measured = {
            "reward/mean": float(clip.mean()),
            "reward/shapes/mean": float(gold.mean()),
            "diversity": float(np.nanmean(diversity(images, np.arange(heldout) // 2))),
            **{name: float(values.mean()) for name, values in monitor(images).items()},
        }
        gallery.add(
            "evaluation",
            done,
            images,
            texts[:heldout],
            {"total": clip, "clip": clip, "shapes": gold},
            tasks=["counting" if i % 2 else "colors" for i in range(heldout)],
            summary={"metrics": measured, "gold": {"shapes": 1.0}},
        )
        return measured

    for done, text in ((0, "begun"), (0, HOSTILE), (2, "ended by Preempted"), (2, "resumed")):
        record_event(directory, done, text)
    evaluation(0)
    with MetricsLog(directory) as log:
        for iteration in range(iterations):
            done = iteration + 1
            progress = done / iterations
            count = prompts * group
            rewards = 0.5 + 0.25 * progress + rng.normal(0, 0.05, count)
            groups = rewards.reshape(prompts, group)
            advantages = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
            gallery.add(
                "rollout",
                iteration,
                drawn(count, progress),
                [texts[i // group] for i in range(count)],
                {"total": rewards, "clip": rewards},
                advantages=advantages.ravel(),
                group=group,
            )
            row = {
                "reward/mean": rewards.mean(),
                "reward/std": rewards.std(),
                "reward/group_std": 0.8 * rewards.std(),
                "reward/clip/mean": rewards.mean(),
                "kl": 2e-3 * progress**2,
                "approx_kl": 1e-4 * rng.random(),
                "clip_fraction": 0.2 + 0.1 * rng.random(),
                "ratio/min": 0.998,
                "ratio/mean": 1.0,
                "ratio/max": 1.002 + 1e-3 * rng.random(),
                "loss": rng.normal(),
                "grad_norm": rng.gamma(2.0),
                "advantage/zero_groups": 0.0,
                "images_per_second": 3.2 + 0.1 * rng.random(),
                "time/sample": 10.0 + rng.random(),
                "time/reward": 1.0,
                "time/update": 9.0 + rng.random(),
                "time/iteration": 21.0,
            }
            if done % evaluate_every == 0:
                row |= {f"eval/{name}": value for name, value in evaluation(done).items()}
            log.write(iteration, row)
    if finished:
        (directory / "evaluation.json").write_text(json.dumps({"images": heldout, "rewards": {}}))
    return directory
