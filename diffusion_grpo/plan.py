"""Will it fit, and how fast: a run's memory and time on devices that need not be here.

Everything is traced with shapes alone: no weight is read, nothing is compiled or run. Each device
is given its share of every microbatch, and of the parameters what `mesh.fsdp` leaves it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.conditioning import conditioning_shapes
from diffusion_grpo.config import Config
from diffusion_grpo.consistency import images_learned_from
from diffusion_grpo.costs import Cost, program_cost
from diffusion_grpo.devices import Device
from diffusion_grpo.errors import UsageError
from diffusion_grpo.lanes import MOST, cores
from diffusion_grpo.learning import GRPOLearner, make_learner
from diffusion_grpo.lora import LoRAParam
from diffusion_grpo.mesh import parameter_spec
from diffusion_grpo.models.kernels import planned_for
from diffusion_grpo.models.unet import UNet2DConditionModel
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.optim import make_optimizer
from diffusion_grpo.pipeline import TrainablePolicy, adapted_network
from diffusion_grpo.preparation import lora_options, make_rollout
from diffusion_grpo.pretrained import DTYPES, check_fit, local_directory, read_unet_config
from diffusion_grpo.programs import noise_steps, update_arguments
from diffusion_grpo.published import ARCHITECTURES, HUB_IDS, Architecture, text_networks
from diffusion_grpo.schedule import SchedulerConfig
from diffusion_grpo.trajectories import ESTIMATORS

USABLE = 0.92  # share of a device's memory that a run can have


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs of each device.

    Attributes:
        memory: part → bytes.
        seconds: phase → seconds an iteration: sample, decode, update, communicate.
        flops: phase → operations of all devices together.
        communicated: bytes that each device sends in an iteration.
        largest_microbatch: images differentiated at a time that fit, of one device; 0 for none.
        fits: whether the configured ones do.
        warnings: a line each.
    """

    memory: dict[str, int]
    seconds: dict[str, float]
    flops: dict[str, float]
    communicated: int
    largest_microbatch: int
    fits: bool
    warnings: list[str]

    @property
    def peak(self) -> int:
        """Bytes of all parts, those of the three programs counted once: the largest."""
        programs = [v for k, v in self.memory.items() if k.startswith("while ")]
        held = sum(v for k, v in self.memory.items() if not k.startswith("while "))
        return held + max(programs)


def find_architecture(name: str, *, revision: str | None = None) -> Architecture:
    """Return the networks of a checkpoint: a published one, or by its configuration files.

    Args:
        name: a directory, the name of a shipped checkpoint, or a hub id.
        revision: of a hub repository; the published ones are of their main branch.

    Raises:
        UsageError: it is not there, or not supported.
    """
    if name in HUB_IDS and revision is None:
        return ARCHITECTURES[HUB_IDS[name]]
    directory = local_directory(name, revision=revision)

    def read(*parts: str) -> dict[str, Any]:
        path = directory.joinpath(*parts)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as JSON: {error}") from None

    text = read("text_encoder", "config.json")
    second = directory / "text_encoder_2"
    text_2 = read("text_encoder_2", "config.json") if second.is_dir() else None
    pipeline = str(read("model_index.json").get("_class_name"))
    unet = read_unet_config(read("unet", "config.json"), pipeline)
    vae = VAEConfig.from_dict(read("vae", "config.json"))
    check_fit(directory, unet, vae, [text] if text_2 is None else [text, text_2])
    return Architecture(
        unet,
        vae,
        read("scheduler", "scheduler_config.json"),
        text,
        int(text.get("max_position_embeddings", 77)),
        text_2,
    )


def make_plan(config: Config, model: Architecture, device: Device, count: int) -> Plan:
    """Plan a run.

    Args:
        config: the run's, validated; GRPO.
        model: its networks.
        device: of which kind.
        count: how many; `config.mesh` says how they are laid out, as in a run.

    Raises:
        UsageError: the algorithm is not GRPO, the mesh has another number of devices, or the
            devices do not divide the microbatches.
    """
    if config.grpo.algorithm != "grpo":
        raise UsageError("plan knows GRPO alone: grpo.algorithm is 'nft'")
    mesh = config.mesh
    laid_out = mesh.fsdp * (max(count // mesh.fsdp, 1) if mesh.data is None else mesh.data)
    if laid_out != count:
        raise UsageError(
            f"mesh.data {mesh.data} x mesh.fsdp {mesh.fsdp} lays a run over {laid_out} devices, "
            f"but {count} {'is' if count == 1 else 'are'} planned for; expected --devices "
            f"{laid_out}"
        )
    for name, size in (
        ("rollout.microbatch", config.rollout.microbatch),
        ("grpo.microbatch", config.grpo.microbatch),
    ):
        if size % count:
            raise UsageError(
                f"{name} is {size}, which {count} devices do not divide; expected a multiple of "
                f"{count}"
            )
    with planned_for(device.backend):
        return _Planner(config, model, device, count).plan()


class _Planner:
    """The pieces of a plan."""

    def __init__(self, config: Config, model: Architecture, device: Device, count: int) -> None:
        self.config, self.model, self.device, self.count = config, model, device, count
        dtype = DTYPES[config.model.dtype]
        full = config.model.trainable == "full"
        frozen = {"dtype": dtype, "param_dtype": dtype}
        lora = lora_options(config)

        def network() -> nnx.Module:
            rngs, master = nnx.Rngs(0), jnp.float32 if full else dtype
            unet = UNet2DConditionModel(model.unet, dtype=dtype, param_dtype=master, rngs=rngs)
            unet.gradient_checkpointing = config.model.gradient_checkpointing
            if lora is None:
                return unet
            parts: dict[str, Any] = {"unet": unet}
            if "text_encoder" in lora:
                for name, (kind, text) in text_networks(model).items():
                    parts[name] = kind(text, rngs=rngs, **frozen)
            return adapted_network(parts, lora, clip_skip=config.model.clip_skip, rngs=rngs)

        self.dtype = dtype
        self.policy = TrainablePolicy(
            nnx.eval_shape(network),
            config.rollout.guidance_scale,
            nnx.Param if full else LoRAParam,
            noise_steps=noise_steps(config),
        )
        factor = model.vae.downscale_factor
        size = model.unet.sample_size or 64
        default = (size, size) if isinstance(size, int) else size
        given = (config.rollout.height, config.rollout.width)
        sides = [d if g is None else g // factor for g, d in zip(given, default, strict=True)]
        self.latent = (sides[0], sides[1], model.unet.in_channels)
        self.image = (factor * sides[0], factor * sides[1], 3)
        scheduler = SchedulerConfig.from_dict(model.scheduler)
        learner = make_learner(config, self.policy, scheduler, self.latent)
        assert isinstance(learner, GRPOLearner)
        self.learner = learner
        self.notes: list[str] = []

    def conditioning(self, size: int) -> tuple[Any, Any]:
        """Return the shapes of what the denoiser is conditioned on."""
        unet, tokens = self.model.unet, self.model.tokens
        encoders = len(text_networks(self.model)) if self.policy.reads_tokens else 0
        prompts, negative = (
            conditioning_shapes(unet, count, tokens, self.dtype, encoders=encoders)
            for count in (size, 1)
        )
        return prompts, negative

    def noise(self, size: int) -> Any:
        """Return the shape of x_T."""
        return jax.ShapeDtypeStruct((size, *self.latent), jnp.float32)

    def update(self, size: int) -> Cost:
        """Return the cost of the gradient of one step of a microbatch."""
        arguments = update_arguments(
            self.learner, self.policy, self.noise(size), self.conditioning(size)
        )
        return program_cost(self.learner.loss.accumulate, *arguments)

    def sample(self, size: int) -> Cost:
        """Return the cost of drawing a microbatch."""
        draw = make_rollout(self.config, self.learner.policy)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        return program_cost(
            draw,
            self.policy.trained,
            self.policy.frozen,
            self.learner.schedule(0),
            self.noise(size),
            keys,
            self.conditioning(size),
        )

    def plan(self) -> Plan:
        """Put it together."""
        config, device, count = self.config, self.device, self.count
        rollout, options = config.rollout, config.grpo
        images = rollout.num_images // count
        chosen = images_learned_from(rollout, options) // count
        drawn, learned = rollout.microbatch // count, options.microbatch // count
        vae = nnx.eval_shape(
            lambda: AutoencoderKL(
                self.model.vae, dtype=self.dtype, param_dtype=self.dtype, rngs=nnx.Rngs(0)
            )
        )
        graphdef, vae_weights = nnx.split(vae)

        def decode(weights: Any, latents: Any) -> Any:
            return nnx.merge(graphdef, weights).decode(latents)

        full, fsdp = config.model.trainable == "full", config.mesh.fsdp
        shards = fsdp if full else 1  # an adapter and all that has its shape are whole everywhere
        whole = size_of(self.policy.trained)
        trained = share_of(self.policy.trained, shards)
        network = share_of(self.policy.frozen, fsdp)
        frozen = network if self.policy.reads_tokens else network + self.text_bytes()
        optimizer, _ = make_optimizer(config.optim, 1, config.run.iterations)
        state = share_of(jax.eval_shape(optimizer.init, self.policy.trained), shards)
        # A program gathers what is divided and holds it beside the shares, while it runs; what a
        # ring sends for that is all that a device has not got.
        gather = whole - trained + size_of(self.policy.frozen) - network
        gathered = gather * fsdp // (fsdp - 1) if gather else 0

        def lanes(microbatches: int) -> int:
            """How many microbatches are at work at the same time; see `lanes.py`."""
            here = min(MOST, cores()) if device.backend == "cpu" and count == 1 else 1
            return min(here, microbatches)

        held = {
            "frozen parameters": frozen + size_of(vae_weights),
            "trained parameters": trained,
            "reference": trained,
            "optimizer state": state + (trained if config.optim.ema_decay is not None else 0),
            "gradient": trained * lanes(chosen // learned),
            "trajectories": self.trajectory_bytes(images),
        }
        sample, update = self.sample(drawn), self.update(learned)
        decoded = program_cost(decode, vae_weights, self.noise(drawn))
        programs = {
            "while sampling": round(
                device.slack * (sample.peak + gathered) * lanes(images // drawn)
            ),
            "while decoding": round(device.slack * decoded.peak),
            "while updating": round(
                device.slack * (update.peak + gathered) * lanes(chosen // learned)
            ),
        }
        active, steps = self.steps()
        updates, needs = options.updates_per_rollout, self.learner.loss.config
        sweeps = updates - 1 if options.ratio == "trajectory" else 0
        sweeps += bool(needs.needs_reference_means or needs.needs_reference_log_probs)
        sweeps += bool(needs.needs_old_means)
        calls = chosen // learned * steps * updates
        extra = sweeps * active / rollout.num_steps  # forward sweeps, in rollouts
        extra *= chosen / images
        parts = images // drawn
        rate = device.flops if config.model.dtype == "bfloat16" else device.flops_float32
        sampled = parts * device.seconds(sample, rate)
        # An adapter's gradient is summed over the devices once an update, a network's in each call.
        reduced = round(2 * (count - 1) / count * whole) * (calls if full else updates)
        gathers = (parts + calls + self.sweep_calls()) * gather
        communicated = reduced + gathers
        seconds = {
            "sample": sampled,
            "decode": parts * device.seconds(decoded, rate),
            "update": calls * device.backward * device.seconds(update, rate) + extra * sampled,
            "communicate": communicated / device.link,
        }
        flops = {
            "sample": count * parts * sample.flops,
            "decode": count * parts * decoded.flops,
            "update": count * (calls * update.flops + extra * parts * sample.flops),
        }
        found = Plan(held | programs, seconds, flops, communicated, 0, False, [])
        limit = USABLE * device.memory
        fixed = sum(held.values()) + round(device.slack * gathered)
        largest = self.largest(fixed, update, learned, limit, chosen)
        return dataclasses.replace(
            found,
            largest_microbatch=largest,
            fits=found.peak <= limit,
            warnings=self.warnings(found, limit, largest),
        )

    def largest(self, held: int, update: Cost, size: int, limit: float, images: int) -> int:
        """Return the largest divisor of the images whose gradient fits: memory is linear in it."""
        other = self.update(2 * size)
        slope = (other.peak - update.peak) / size
        fixed = update.peak - slope * size
        sizes = [n for n in range(1, images + 1) if images % n == 0]
        fitting = [n for n in sizes if held + self.device.slack * (fixed + slope * n) <= limit]
        return max(fitting, default=0)

    def warnings(self, plan: Plan, limit: float, largest: int) -> list[str]:
        """Say what will go wrong or is wasteful."""
        config = self.config
        found = []
        if plan.peak > limit:
            mend = f"grpo.microbatch {largest} fits" if largest else "no microbatch fits"
            if not config.model.gradient_checkpointing:
                mend += "; --model.gradient-checkpointing True needs less"
            if config.model.trainable == "full":
                mend += "; --model.trainable lora needs less"
            found.append(
                f"it does not fit: {plan.peak / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB; {mend}"
            )
        elif config.model.gradient_checkpointing and plan.peak < limit / 3:
            found.append(
                "gradient checkpointing costs a third of the update's time, and most of the memory "
                "is free: try --model.gradient-checkpointing False"
            )
        if config.model.dtype == "float32" and self.device.backend != "cpu":
            found.append(
                "float32 on an accelerator: --model.dtype bfloat16 is several times faster"
            )
        return found

    def steps(self) -> tuple[int, int]:
        """Return (A, K), the steps that take part and those that are differentiated."""
        active = len(self.learner.plan(self.learner.schedule(0), 0).active)
        return active, self.config.grpo.gradient_steps or active

    def sweep_calls(self) -> int:
        """Return how many programs of an iteration evaluate recorded steps, without a gradient."""
        rollout, options, needs = self.config.rollout, self.config.grpo, self.learner.loss.config
        images = images_learned_from(rollout, options)
        calls = 0
        if options.ratio == "trajectory" or needs.kl in ESTIMATORS:  # after the first update
            calls += (options.updates_per_rollout - 1) * (images // options.microbatch)
        others = bool(needs.needs_reference_means or needs.needs_reference_log_probs)
        others += bool(needs.needs_old_means)
        return calls + others * (images // math.gcd(rollout.microbatch, images))

    def text_bytes(self) -> int:
        """Bytes of the text encoders, about: embeddings and layers."""
        numbers = 0
        for fields in filter(None, (self.model.text_encoder, self.model.text_encoder_2)):
            width, layers = int(fields["hidden_size"]), int(fields["num_hidden_layers"])
            inner = int(fields["intermediate_size"])
            vocabulary = int(fields.get("vocab_size", 49408))
            numbers += width * (vocabulary + self.model.tokens)
            numbers += layers * (4 * width * width + 2 * width * inner)
        return numbers * jnp.dtype(self.dtype).itemsize

    def trajectory_bytes(self, images: int) -> int:
        """Bytes that are kept from rollout to update: latents, means, text states, pictures."""
        needs, steps = self.learner.loss.config, self.config.rollout.num_steps
        latent = int(np.prod(self.latent))
        storage = jnp.dtype(DTYPES[self.config.rollout.storage_dtype]).itemsize
        means = 4 * steps * (needs.needs_reference_means + needs.needs_old_means)
        text = size_of(self.conditioning(1)[0])
        # twice: the parts of the rollout and what they are joined to
        latents = 2 * (steps + 1) * storage * latent
        return images * (latents + means * latent + text + int(np.prod(self.image)))


def size_of(tree: Any) -> int:
    """Return the bytes of a pytree of arrays or shapes."""
    return sum(
        int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def share_of(tree: Any, size: int) -> int:
    """Return the bytes that each of `size` devices has of parameters divided as `mesh.divided`."""
    return sum(
        size_of(leaf) // (size if "fsdp" in parameter_spec(leaf.shape, size) else 1)
        for leaf in jax.tree.leaves(tree)
    )


def table(
    plan: Plan, limit: float, say: Callable[[str], Any] = print, *, rewards: Sequence[str] = ()
) -> None:
    """Say a plan as a table, and that of rewards, whose networks it does not know, it has none."""
    for name, size in plan.memory.items():
        say(f"{name:<24}{size / 2**30:>10.3f} GiB")
    say(f"{'peak of each device':<24}{plan.peak / 2**30:>10.3f} GiB of {limit / 2**30:.1f}")
    for name, seconds in plan.seconds.items():
        flops = plan.flops.get(name)
        work = "" if flops is None else f"  {flops / 1e12:.4g} TFLOP"
        say(f"{name:<24}{seconds:>10.4g} s{work}")
    say(f"{'iteration':<24}{sum(plan.seconds.values()):>10.4g} s")
    say(f"{'sent in an iteration':<24}{plan.communicated / 2**20:>10.4g} MiB")
    say(f"{'largest microbatch':<24}{plan.largest_microbatch:>10} images to differentiate")
    if rewards:
        names = ", ".join(rewards)
        say(f"not counted             memory and time of the rewards: {names}")
    for line in plan.warnings:
        say(f"warning: {line}")
