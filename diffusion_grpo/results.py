"""What a run leaves behind: metrics, grids, `evaluation.json`, the exported model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_grpo import processes
from diffusion_grpo.config import Config
from diffusion_grpo.evaluate import Evaluation
from diffusion_grpo.evaluation_summary import number_or_none, summarize, to_markdown
from diffusion_grpo.grids import before_after_grid, image_grid
from diffusion_grpo.images import save_image
from diffusion_grpo.lora import lora_factors, merge_lora
from diffusion_grpo.lora_files import FILE, write_lora
from diffusion_grpo.mesh import alone, to_host
from diffusion_grpo.model_card import model_card
from diffusion_grpo.output_files import whole_folder, write_whole
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.sampling import SamplingDefaults
from diffusion_grpo.text_encoding import pipeline_parts


def update_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Reduce an iteration's updates: the ratio's extremes, how many were skipped, else means.

    A mean is over the updates that have the number.
    """
    reduce = {"ratio/min": np.min, "ratio/max": np.max, "skipped": np.sum}
    names = dict.fromkeys(name for each in history for name in each)
    return {
        name: float(reduce.get(name, np.mean)([h[name] for h in history if name in h]))
        for name in names
    }


def group_metrics(
    total: np.ndarray, advantages: Any, kept: np.ndarray, group_size: int
) -> dict[str, float]:
    """Return what says how much the groups that were kept have to teach.

    Args:
        total: the summed reward [B], group by group.
        advantages: [B].
        kept: [B], false for the images of dropped groups.
        group_size: G.
    """
    rewards = np.asarray(total, np.float64)[kept].reshape(-1, group_size)
    each = np.asarray(advantages)[kept].reshape(-1, group_size)
    return {
        "reward/group_std": float(rewards.std(axis=1).mean()),
        "advantage/zero_groups": float((each == 0).all(axis=1).mean()),
    }


def describe(evaluation: Evaluation, when: str) -> str:
    """Return one line: each reward's mean with its standard error, if there are several prompts."""
    parts = []
    for name, values in evaluation.reported.items():
        error = evaluation.error(values)
        parts.append(f"{name} {values.mean():.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}"))
    return f"evaluation, {when}: " + ", ".join(parts)


def save_evaluation_grid(evaluation: Evaluation, path: Path, title: str, limit: int = 32) -> None:
    """Draw the first images of an evaluation with their prompts."""
    grid = image_grid(
        evaluation.images[:limit], evaluation.prompts[:limit], columns=min(8, limit), title=title
    )
    save_image(path, grid)


def means_title(before: Evaluation, after: Evaluation, shown: int) -> str:
    """Return the heading of the grid of pairs: the means of the whole evaluation, not of a part."""
    count = len(before.images)
    part = f", {shown} of them shown" if shown < count else ""
    means = f"before {before.total.mean():.3f}, after {after.total.mean():.3f}"
    return f"mean score of {count} images{part}: {means}"


def save_results(config: Config, directory: Path, before: Evaluation, after: Evaluation) -> None:
    """Write the grids after training, `evaluation.json` and the same as Markdown.

    It has, for each reward, the mean before and after, and the mean of the paired difference, with
    their standard errors: null where a single prompt is evaluated.
    """
    save_evaluation_grid(after, directory / "samples" / "after.png", "after training")
    each = config.eval.images_per_prompt
    rows = min(len(before.images), 12 * each)
    grid = before_after_grid(
        before.images[:rows],
        after.images[:rows],
        before.prompts[:rows:each],
        scores_before=before.total[:rows],
        scores_after=after.total[:rows],
        title=means_title(before, after, rows),
    )
    save_image(directory / "samples" / "before_after.png", grid)
    ends = after.reported
    summary = {
        name: {
            "before": float(first.mean()),
            "before_standard_error": number_or_none(before.error(first)),
            "after": float(ends[name].mean()),
            "after_standard_error": number_or_none(after.error(ends[name])),
            "difference": float((ends[name] - first).mean()),
            "difference_standard_error": number_or_none(after.error(ends[name] - first)),
        }
        for name, first in before.reported.items()
    }
    evaluated = {"before": summarize(before), "after": summarize(after, before)}
    found = {"images": len(before.images), "rewards": summary} | evaluated
    text = json.dumps(found, indent=2, allow_nan=False)
    write_whole(directory / "evaluation.json", text + "\n")
    write_whole(directory / "evaluation.md", to_markdown("Evaluation", evaluated))


def export(
    config: Config,
    model: StableDiffusion,
    policy: Any,
    trained: Any,
    directory: Path,
    *,
    run: Path | None = None,
) -> None:
    """Write the fine-tuned pipeline, adapters merged, in the Diffusers layout, with a model card.

    It says to be sampled as it was evaluated: with the guidance it was trained with. An adapter is
    under `lora/` too, by itself. The kernels that it is merged into are written in float32, for
    bfloat16 would round most of it away. All processes have to call it, since parameters may be
    divided over them.

    Args:
        config: the run's.
        model: what it started from.
        policy: the network, and what of it is frozen.
        trained: what of it is trained.
        directory: the folder; one that is there stays until the new one is whole.
        run: the run's directory, if the folder is not in it.
    """
    frozen = policy.frozen
    if processes.count() > 1:
        writes = processes.leads()
        trained, frozen = to_host(trained, keep=writes), to_host(frozen, keep=writes)
    if not processes.leads():
        return
    with alone(), whole_folder(directory) as folder:
        parts = pipeline_parts(policy.network(trained, frozen))
        if config.model.trainable == "lora":
            factors = {name: lora_factors(part) for name, part in parts.items()}
            write_lora(factors, folder / "lora" / FILE)
        for part in parts.values():
            merge_lora(part, dtype=jnp.float32)
        sampling = SamplingDefaults(
            config.rollout.guidance_scale,
            config.eval.num_steps,
            config.model.clip_skip,
            config.rollout.negative_prompt,
            config.rollout.height,
            config.rollout.width,
        )
        dataclasses.replace(model, sampling=sampling, **parts).save_pretrained(folder)
        card = model_card(
            run or directory.parent,
            "diffusers",
            sampling,
            clip_sample=model.scheduler_config.clip_sample,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
