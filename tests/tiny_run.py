"""A run on a checkpoint that Diffusers itself wrote, as short as one can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_grpo.config import Config, load_config
from diffusion_grpo.metrics import read_metrics


def flags(checkpoint: Path | str, folder: Path, **changed: Any) -> list[str]:
    """Return the flags of a run in `folder / "run"`; `changed` are fields, `__` for the dot."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\ntwo green stars\n")
    fields = {
        "model__pretrained": checkpoint,
        "prompts__train": prompts,
        "prompts__heldout": prompts,
        "reward__rewards": "jpeg_size",
        "rollout__prompts_per_iteration": 2,
        "rollout__images_per_prompt": 4,
        "rollout__num_steps": 2,
        "rollout__guidance_scale": 1,
        "rollout__microbatch": 8,
        "grpo__microbatch": 8,
        "grpo__updates_per_rollout": 1,
        "grpo__beta": 0,
        "optim__learning_rate": 1e-3,
        "eval__num_prompts": 2,
        "eval__num_steps": 1,
        "run__iterations": 2,
        "run__save_every": 1,
        "run__sample_every": 0,
        "run__tensorboard": "off",
        "run__report": False,
        "run__output": folder / "run",
    }
    words: list[str] = []
    for name, value in (fields | changed).items():
        words += [f"--{name.replace('__', '.').replace('_', '-')}", *str(value).split()]
    return words


def config(checkpoint: Path | str, folder: Path, **changed: Any) -> Config:
    """Return the configuration of `flags`."""
    return load_config(None, flags(checkpoint, folder, **changed))


def lasting(directory: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run but for those of time."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith("time/") and name != "images_per_second"
        }
        for row in read_metrics(directory)
    ]
