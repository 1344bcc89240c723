"""`diffusion-grpo export`: a run's model in the form and precision that its user needs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_grpo.commands.common import Talk, parse
from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.output_files import emptied_on_failure
from diffusion_grpo.run_models import find_model

FORMATS = ("diffusers", "lora", "kohya", "merged")
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a run's model for Diffusers, with a model card.

    diffusers: the whole pipeline, an adapter merged in. merged: its UNet alone, an adapter merged
    in. lora: the adapter alone, as `pipe.load_lora_weights` loads it. kohya: the same by the names
    of kohya's scripts, for web interfaces.
    """

    run: Annotated[str, tyro.conf.Positional]
    """A run directory, for its trained model; RUN@best for its best one, and RUN@N for that of the
    checkpoint after N iterations, for a run that was stopped or goes on."""
    output: Path
    """A new or empty folder."""
    format: str = "diffusers"
    """diffusers, lora, kohya or merged."""
    dtype: str = "float32"
    """Of the written weights: float32, float16 or bfloat16."""
    quiet: bool = False
    """Say nothing but errors and what was written."""
    verbose: bool = False
    """Say more."""

    def check(self) -> None:
        """Refuse what no model is needed to refuse.

        Raises:
            UsageError: an option that does not exist, or a folder that is in use.
        """
        for name, allowed in (("format", FORMATS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(
                    f"{name} is {value!r}{suggest(value, allowed)}; expected one of "
                    f"{', '.join(allowed)}"
                )
        output = self.output.expanduser()
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(
                f"output {str(output)!r} is there and not an empty folder; choose another"
            )
        above = next(p for p in (output, *output.absolute().parents) if p.exists())
        if not os.access(above, os.W_OK):
            raise UsageError(
                f"output {str(output)!r}: {str(above)!r} is not writable; choose another"
            )


def run(words: Sequence[str]) -> list[Path]:
    """Read and write; returns what was written."""
    options = parse(ExportOptions, words, "diffusion-grpo export")
    options.check()
    name, _, which = options.run.rpartition("@")
    directory = Path(name or which).expanduser()
    if not (directory / "config.yaml").is_file():
        raise UsageError(
            f"{options.run!r} is no run directory: there is no config.yaml in it; expected what "
            "--run.output of `train` named"
        )
    if name and which == "base":
        raise UsageError(
            f"{options.run!r} is what the run started from, not what it trained; leave @base out"
        )
    with contextlib.ExitStack() as stack:
        if name and which.isdigit():
            from diffusion_grpo.restoring import export_checkpoint

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="diffusion-grpo-"))
            place, iteration = Path(folder) / "model", int(which)
            export_checkpoint(directory, iteration, place)
        else:
            place = Path(find_model(options.run).place)
            iteration = _best_iteration(directory) if place.name == "best" else None
        with emptied_on_failure(options.output.expanduser()):
            return [_write(options, directory, place, iteration)]


def _best_iteration(run: Path) -> int | None:
    """Return after how many iterations best/ was kept, if the run says so.

    A run that goes on may have a newer best/ than `best.json`, which then names another model.
    """
    file = run / "best.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found["iterations"] if found.get("model") == "best/" else None


def _write(options: ExportOptions, run: Path, place: Path, iteration: int | None) -> Path:
    """Write what is asked for of the model at `place`, the run's or a checkpoint's of it."""
    output = options.output.expanduser()

    from diffusion_grpo.components import read_json
    from diffusion_grpo.config import load_config
    from diffusion_grpo.lora_files import FILE
    from diffusion_grpo.model_card import model_card
    from diffusion_grpo.sampling import SamplingDefaults, read_sampling
    from diffusion_grpo.schedule import SchedulerConfig

    sampling = read_sampling(place) or SamplingDefaults()
    if (
        options.format == "merged"
        and load_config(str(run / "config.yaml")).model.train_text_encoder
    ):
        raise UsageError(
            f"{options.run!r} trained the text encoders too (model.train_text_encoder), and merged "
            "is the UNet alone; expected --format diffusers or lora"
        )
    is_adapter = options.format in ("lora", "kohya")
    if is_adapter:
        source = place / "lora" / FILE
        if not source.is_file():
            raise UsageError(
                f"{options.run!r} has no adapter: the run trained all weights of the UNet "
                "(model.trainable full); expected --format diffusers or merged"
            )
        _copy_adapter(source, output / FILE, options.dtype, kohya=options.format == "kohya")
    else:
        _write_model(place, output, whole=options.format == "diffusers", dtype=options.dtype)
    fields = read_json(place / "scheduler" / "scheduler_config.json")
    pipeline = str(read_json(place / "model_index.json").get("_class_name"))
    schedule = SchedulerConfig.from_dict(fields, pipeline=pipeline)
    card = model_card(
        run,
        "lora" if is_adapter else options.format,
        sampling,
        clip_sample=schedule.clip_sample,
        iteration=iteration,
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    talk = Talk(options.quiet, options.verbose)
    talk.say(f"{options.format} of {options.run}, {options.dtype}")
    return output


def _copy_adapter(source: Path, target: Path, dtype: str, *, kohya: bool) -> None:
    """Write the adapter of an exported pipeline, `lora/` in its folder, anew."""
    from diffusion_grpo.components import read_json
    from diffusion_grpo.lora_files import of_kohya
    from diffusion_grpo.models.unet import UNetConfig
    from diffusion_grpo.pretrained import DTYPES
    from diffusion_grpo.tensor_files import open_file, write_file

    tensors = open_file(source)
    if kohya:
        config = UNetConfig.from_dict(read_json(source.parents[1] / "unet" / "config.json"))
        tensors = of_kohya(tensors, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(tensors.cast(DTYPES[dtype]).entries, target)


def _write_model(place: Path, output: Path, *, whole: bool, dtype: str) -> None:
    from diffusion_grpo.components import save_module
    from diffusion_grpo.pretrained import DTYPES, StableDiffusion

    model: Any = StableDiffusion.from_pretrained(place)
    if whole:
        model.save_pretrained(output, dtype=DTYPES[dtype])
    else:
        save_module(model.unet, output, model.configs["unet"], dtype=DTYPES[dtype])
