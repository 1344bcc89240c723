"""A run's model card: what was trained, on what, with which results, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffusion_grpo import __version__
from diffusion_grpo.prompts import evaluated_on
from diffusion_grpo.resources import resource_path
from diffusion_grpo.sampling import SamplingDefaults

_LOADING = {
    "diffusers": """pipe = DiffusionPipeline.from_pretrained("PATH/TO/THIS/DIRECTORY")
""",
    "merged": """unet = UNet2DConditionModel.from_pretrained("PATH/TO/THIS/DIRECTORY")
pipe = DiffusionPipeline.from_pretrained({base}, unet=unet)
""",
    "lora": """pipe = DiffusionPipeline.from_pretrained({base})
pipe.load_lora_weights("PATH/TO/THIS/DIRECTORY")
""",
}
_IMPORTS = {
    "diffusers": "DDIMScheduler, DiffusionPipeline",
    "merged": "DDIMScheduler, DiffusionPipeline, UNet2DConditionModel",
    "lora": "DDIMScheduler, DiffusionPipeline",
}


def model_card(
    run: Path,
    kind: str,
    sampling: SamplingDefaults,
    *,
    clip_sample: bool = False,
    iteration: int | None = None,
) -> str:
    """Return the card of a run's model as Markdown, with the front matter that hubs read.

    Args:
        run: the run directory; `config.yaml` is there, `evaluation.json` if the run is finished.
        kind: what stands beside the card: diffusers, merged or lora.
        sampling: what the model was evaluated with, and trained in: DDIM steps, whatever sampler
            the checkpoint names.
        clip_sample: of the checkpoint's schedule.
        iteration: of the checkpoint that it is the model of, if not of the end of the run.
    """
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    model, base = config["model"], str(config["model"]["pretrained"])
    place = Path(base).expanduser()
    # By its name alone: a card is also written where a base that was a directory is gone.
    shipped = place.name == base and resource_path("assets", base).is_dir()
    embedded = shipped and not place.is_dir()
    source = repr(f"PATH/TO/{base}" if embedded else base)
    source += "".join(
        f", {name}={model[name]!r}" for name in ("revision", "variant") if model.get(name)
    )
    settings = {
        "guidance_scale": f"{sampling.guidance_scale:g}",
        "num_inference_steps": str(sampling.num_steps),
        **({"clip_skip": str(sampling.clip_skip)} if sampling.clip_skip else {}),
    }
    for name in ("negative_prompt", "height", "width"):
        if value := config["rollout"].get(name):
            settings[name] = repr(value)
    algorithm = {"grpo": "GRPO", "nft": "DiffusionNFT"}[config["grpo"]["algorithm"]]
    rewards = ", ".join(f"`{reward}`" for reward in config["reward"]["rewards"])
    encoders = " and text encoders" if model.get("train_text_encoder") else ""
    trained = {"lora": f"a LoRA adapter of its UNet{encoders}", "full": "its UNet in full"}
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({} if embedded else {"base_model": base}),
        "tags": ["text-to-image", "diffusion-grpo", *(["lora"] if kind == "lora" else [])],
    }
    example = f"from diffusers import {_IMPORTS[kind]}\n\n{_LOADING[kind].format(base=source)}"
    example += (
        "pipe.scheduler = DDIMScheduler.from_config(\n"
        f"    pipe.scheduler.config, clip_sample={clip_sample}\n)\n"
    )
    given = ", ".join(f"{name}={value}" for name, value in settings.items())
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    example += f"image = pipe(\n    PROMPT, {given}\n).images[0]\n"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {run.resolve().name}\n",
        f"`{base}`, {trained[config['model']['trainable']]} fine-tuned toward {rewards} with "
        f"{algorithm} by diffusion-grpo {__version__}.\n",
        "" if iteration is None else f"It is the checkpoint after {iteration} iterations.\n",
        f"```python\n{example}```\n",
        f"`{base}` comes with diffusion-grpo: it is in `assets/` of a checkout.\n"
        if embedded and kind != "diffusers"
        else "",
        f"The results are for DDIM steps, {said}.\n",
        _results(run, config),
        f"## Configuration\n\n```yaml\n{text.strip()}\n```\n",
    ]
    return "\n".join(filter(None, parts))


def _results(run: Path, config: Mapping[str, Any]) -> str:
    file = run / "evaluation.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    lists = config["prompts"]
    which = evaluated_on(lists["heldout"], lists["heldout_share"])
    rows: list[Sequence[str]] = [
        (
            f"`{name}`",
            _with_error(r, "before"),
            _with_error(r, "after"),
            _with_error(r, "difference"),
        )
        for name, r in found["rewards"].items()
    ]
    head = "| reward | before | after | difference |\n|---|---|---|---|\n"
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return (
        f"## Results\n\nMeans over {found['images']} images of {which} prompts before and after "
        f"training, ± standard error; the difference is that of pairs.\n\n{head}{lines}"
    )


def _with_error(row: Mapping[str, Any], name: str) -> str:
    error = row[f"{name}_standard_error"]
    return f"{row[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
