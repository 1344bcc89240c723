"""`diffusion-grpo bench`: how fast a run goes on this machine, alone or against PyTorch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from diffusion_grpo.commands.common import Talk, parse
from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import check_output
from diffusion_grpo.run_models import find_models

# What is small enough to be measured in seconds to minutes; flags change it.
GEOMETRIES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "rollout": {
            "prompts_per_iteration": 2,
            "images_per_prompt": 8,
            "num_steps": 10,
        },
        "grpo": {"updates_per_rollout": 1},
    },
}
CLIP_IMAGES = 64
# Flag → section and field of the run's configuration.
FIELDS = {
    "prompts": ("rollout", "prompts_per_iteration"),
    "images_per_prompt": ("rollout", "images_per_prompt"),
    "steps": ("rollout", "num_steps"),
    "window": ("rollout", "window_size"),
    "guidance_scale": ("rollout", "guidance_scale"),
    "height": ("rollout", "height"),
    "width": ("rollout", "width"),
    "microbatch": ("rollout", "microbatch"),
    "update_microbatch": ("grpo", "microbatch"),
    "updates": ("grpo", "updates_per_rollout"),
    "beta": ("grpo", "beta"),
    "dtype": ("model", "dtype"),
    "trainable": ("model", "trainable"),
    "lora_rank": ("model", "lora_rank"),
    "gradient_checkpointing": ("model", "gradient_checkpointing"),
}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Time every phase of an iteration, and its memory; the first word may be a preset.

    All of it is done on the first device, whatever others are there.

    A preset whose checkpoint is not given by --model is measured with random weights where the
    architecture is published (sd15), which changes neither speed nor memory.
    """

    preset: str = "demo"
    """Preset to take model and geometry from: demo or sd15."""
    model: str | None = None
    """Checkpoint in the Diffusers layout, instead of the preset's; or a run."""
    variant: str | None = None
    """Variant of its weight files, such as fp16; without it, RUN@base has the run's."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; without it, RUN@base has the run's."""
    prompts: int | None = None
    """P, prompts an iteration. Options that are not given are the preset's."""
    images_per_prompt: int | None = None
    """G, images of one prompt; given, the update learns from all of them."""
    steps: int | None = None
    """T, denoising steps."""
    algorithm: Literal["grpo", "nft"] | None = None
    """GRPO, or DiffusionNFT with uniform weights and, where --beta is not 0, its own KL."""
    window: int | None = None
    """Learn only from this many of the steps; 0 learns from all."""
    guidance_scale: float | None = None
    """s of classifier-free guidance."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    microbatch: int | None = None
    """Images sampled at a time."""
    update_microbatch: int | None = None
    """Images differentiated at a time; default that of sampling, if --microbatch is given."""
    updates: int | None = None
    """Optimizer steps an iteration."""
    beta: float | None = None
    """Weight of the KL to the reference; 0 leaves it out."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype."""
    trainable: Literal["lora", "full"] | None = None
    """Train an adapter, or all of the UNet."""
    lora_rank: int | None = None
    """Rank of the adapter."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass."""
    reward: str | None = None
    """Reward to score with; default the preset's, but brightness with random weights. A peer knows
    brightness alone."""
    clip: str | None = None
    """Time the score of 64 images by this CLIP checkpoint too: on the device, and by the host."""
    phases: tuple[str, ...] = ()
    """Only these of encode, sample, sample_final, decode, reward, update, iteration."""
    repeats: int = 3
    """Timed calls of each phase after the first, and pairs with a peer."""
    against: Literal["torch"] | None = None
    """Time the same work in PyTorch too, pair by pair."""
    peer_modes: tuple[Literal["eager", "compiled"], ...] = ("compiled", "eager")
    """PyTorch as it is, and by torch.compile."""
    peer: Path | None = None
    """The peer's program; default tests/peers/ddpo_torch.py of a checkout."""
    peer_python: str = sys.executable
    """The Python that has PyTorch and Diffusers."""
    peer_timeout: float = 240.0
    """Seconds that a peer may take in all; what it has measured until then counts."""
    json: Path | None = None
    """Write the record to this file, again after every phase."""
    quiet: bool = False
    """Say nothing but errors and what was written."""
    verbose: bool = False
    """Say more."""

    def check(self) -> None:
        """Refuse what no model is needed to refuse.

        Raises:
            UsageError: an option that is out of bounds.
        """
        known = ("encode", "sample", "sample_final", "decode", "reward", "update", "iteration")
        for phase in self.phases:
            if phase not in known:
                from diffusion_grpo.errors import suggest

                raise UsageError(
                    f"phases has {phase!r}{suggest(phase, known)}; expected {', '.join(known)}"
                )
        if self.repeats < 1:
            raise UsageError(f"repeats is {self.repeats}; expected 1 or more")
        if self.against:
            if self.reward not in (None, "brightness"):
                raise UsageError(
                    f"reward is {self.reward!r}, which the peer does not compute; leave --reward "
                    "out with --against: both score by brightness then"
                )
            self.peer_file()
            if shutil.which(os.path.expanduser(self.peer_python)) is None:
                raise UsageError(
                    f"peer_python is {self.peer_python!r}, which is no program here; expected a "
                    "Python with PyTorch and Diffusers, such as .venv/bin/python"
                )

    def peer_file(self) -> Path:
        """Return the peer's program.

        Raises:
            UsageError: it is not there.
        """
        path = self.peer or Path(__file__).parents[2] / "tests" / "peers" / "ddpo_torch.py"
        path = path.expanduser()
        if not path.is_file():
            raise UsageError(
                f"the peer {str(path)!r} is not there; it lies in the project's checkout under "
                "tests/peers/: give its path with --peer"
            )
        return path


def bench_config(options: BenchOptions, *, random: bool) -> Any:
    """Return the configuration that is measured.

    Raises:
        UsageError: an unknown preset, or options that do not fit each other.
    """
    from diffusion_grpo.config import load_config

    config = load_config(options.preset)
    changes = {k: dict(v) for k, v in GEOMETRIES.get(options.preset, {}).items()}
    for name, (section, field) in FIELDS.items():
        value = getattr(options, name)
        if value is not None:
            changes.setdefault(section, {})[field] = value
    if options.microbatch is not None and options.update_microbatch is None:
        changes.setdefault("grpo", {})["microbatch"] = options.microbatch
    if options.images_per_prompt is not None:
        changes.setdefault("grpo", {})["best_and_worst"] = None
    if options.algorithm is not None:
        changes.setdefault("grpo", {})["algorithm"] = options.algorithm
    if options.algorithm == "nft":
        changes["grpo"] |= {"kl": "mse", "step_weights": "uniform"}
    if options.window == 0:
        changes.setdefault("rollout", {}).update(window_size=None, window_start=0)
    if options.lora_rank is not None:
        changes.setdefault("model", {})["lora_alpha"] = float(options.lora_rank)
    reward = options.reward or ("brightness" if random or options.against else None)
    if reward is not None:
        changes["reward"] = {"rewards": (reward,), "options": ()}
        changes["eval"] = {"gold": (), "patience": 0}
    for section, fields in changes.items():
        part = dataclasses.replace(getattr(config, section), **fields)
        config = dataclasses.replace(config, **{section: part})
    if min(config.rollout.window_size or math.inf, config.rollout.num_steps) == 1:
        # Of a single step no weight is smaller than another's, and 'gain' would leave it out.
        grpo = dataclasses.replace(config.grpo, step_weights="uniform")
        config = dataclasses.replace(config, grpo=grpo)
    config.validate()
    return config


def run(words: Sequence[str]) -> list[Path]:
    """Measure; returns what was written."""
    words = list(words)
    if words and not words[0].startswith("-"):
        words.insert(0, "--preset")
    options = parse(BenchOptions, words, "diffusion-grpo bench")
    options.check()
    if options.json is not None:
        options = dataclasses.replace(options, json=check_output(options.json, (".json",)))
    talk = Talk(options.quiet, options.verbose)
    if options.against:  # the peer needs some of the accelerator's memory too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from diffusion_grpo.published import ARCHITECTURES, random_pipeline

    random = options.model is None and options.preset in ARCHITECTURES
    given = {name: getattr(options, name) for name in ("variant", "revision")}
    for name, value in given.items():
        if random and value is not None:
            raise UsageError(
                f"{name} is {value!r}, but without --model the preset {options.preset!r} is "
                f"measured with random weights; give --model, or leave --{name} out"
            )
    config = bench_config(options, random=random)
    peer_file = options.peer_file() if options.against else None

    import jax.numpy as jnp

    from diffusion_grpo import bench
    from diffusion_grpo.devices import device_here
    from diffusion_grpo.fitting import fitted, fitted_here
    from diffusion_grpo.peer import check_options, check_unet, compare
    from diffusion_grpo.preparation import load_model
    from diffusion_grpo.pretrained import DTYPES, check_clip, local_directory
    from diffusion_grpo.workload import PHASES, Workload

    # What can be wrong is found before minutes of measurement.
    if options.against:
        check_options(config)
    if options.clip is not None:
        check_clip(options.clip)
    random_tokens = None
    if random:
        architecture = ARCHITECTURES[options.preset]
        random_tokens = architecture.tokens
        config, notes = fitted(config, architecture, device_here(), 1)
        full = config.model.trainable == "full"
        model = random_pipeline(
            architecture,
            dtype=DTYPES[config.model.dtype],
            unet_param_dtype=jnp.float32 if full else None,
        )
    else:
        (source,) = find_models([options.model or config.model.pretrained], **given)
        place = local_directory(source.place, revision=source.revision, variant=source.variant)
        config, notes = fitted_here(config, place)
        chosen = dataclasses.replace(config.model, variant=source.variant)
        model = load_model(dataclasses.replace(config, model=chosen), place)
    if options.against:
        check_unet(model.unet.config)
    work = Workload(config, model, random_tokens=random_tokens)
    for note in notes:
        talk.say(note)

    def save(record: dict[str, Any]) -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if record["seconds"]:
            talk.detail(f"measured {', '.join(record['seconds'])}")

    record = bench.measure(
        work, repeats=options.repeats, phases=options.phases or PHASES, on_result=save
    )
    print(bench.table(record), flush=True)
    if peer_file is not None:
        compare(
            work,
            record,
            command=[os.path.expanduser(options.peer_python), str(peer_file)],
            modes=options.peer_modes,
            repeats=options.repeats,
            timeout=options.peer_timeout,
            on_result=save,
        )
        print(bench.peers_table(record), flush=True)
    if options.clip is not None:
        record["clip"] = _clip(options.clip, work, options.repeats)
        save(record)
    return [] if options.json is None else [options.json]


def _clip(checkpoint: str, work: Any, repeats: int) -> dict[str, Any]:
    """Time the CLIP score of 64 random images both ways; prints and returns what was found."""
    import jax
    import jax.numpy as jnp

    from diffusion_grpo.clip_embedding import CLIPEmbedder
    from diffusion_grpo.reward_bench import clip_round_trip

    embedder = CLIPEmbedder.from_pretrained("clip", checkpoint, CLIP_IMAGES)
    height, width, _ = work.shape
    factor = work.model.vae.config.downscale_factor
    shape = (CLIP_IMAGES, factor * height, factor * width, 3)
    images = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    found = clip_round_trip(embedder, images, ["a picture"] * CLIP_IMAGES, repeats=repeats)
    print(
        f"CLIP score of {found.images} images of {shape[1]} x {shape[2]}: "
        f"{1000 * found.device_seconds:.1f} ms on the device, "
        f"{1000 * found.host_seconds:.1f} ms through the host and Pillow",
        flush=True,
    )
    return dataclasses.asdict(found)
