"""Will it fit, and how fast: a run's memory and time on devices that need not be here.

Everything is traced with shapes alone: no weight is read, nothing is compiled or run. Each device
is given its share of every microbatch, and of the parameters what `mesh.fsdp` leaves it.
"""

from __future__ import annotations

import dataclasses
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
from diffusion_grpo.learning import GRPOLearner, NFTLearner, make_learner
from diffusion_grpo.lora import LoRAParam
from diffusion_grpo.microbatches import make_final_rollout, make_rollout
from diffusion_grpo.models.kernels import planned_for
from diffusion_grpo.models.unet import UNet2DConditionModel
from diffusion_grpo.models.vae import AutoencoderKL
from diffusion_grpo.optim import make_optimizer
from diffusion_grpo.pipeline import TrainablePolicy, adapted_network, latent_size
from diffusion_grpo.plan_memory import Memory, linear_peak, peak_of, share_of, size_of
from diffusion_grpo.preparation import lora_options
from diffusion_grpo.pretrained import DTYPES
from diffusion_grpo.programs import noise_steps, update_arguments
from diffusion_grpo.published import Architecture, text_networks
from diffusion_grpo.schedule import SchedulerConfig
from diffusion_grpo.tensors import OneKey, abstract_module

USABLE = 0.92  # share of a device's memory that a run can have


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs of each device.

    Attributes:
        memory: part → bytes.
        seconds: phase → seconds an iteration: sample, decode, update, communicate.
        flops: phase → operations of all devices together.
        communicated: bytes that each device sends in an iteration.
        largest_microbatch: the largest `grpo.microbatch`, of all devices together, whose update
            fits; 0 for none.
        fits: whether the configured microbatches do.
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
        return peak_of(self.memory)


def make_plan(config: Config, model: Architecture, device: Device, count: int) -> Plan:
    """Plan a run.

    Args:
        config: the run's, validated.
        model: its networks.
        device: of which kind.
        count: how many; `config.mesh` says how they are laid out, as in a run.

    Raises:
        UsageError: the mesh has another number of devices, or the devices do not divide the
            microbatches or the prompts.
    """
    check_devices(config, count)
    with planned_for(device.backend):
        return Planner(config, model, device, count).plan()


def check_devices(config: Config, count: int) -> None:
    """Find out whether a run can be laid out over a number of devices.

    Raises:
        UsageError: the mesh has another number, or the devices do not divide the microbatches or
            the prompts, of which each takes whole groups.
    """
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
        ("rollout.prompts_per_iteration", config.rollout.prompts_per_iteration),
    ):
        if size is not None and size % count:
            raise UsageError(
                f"{name} is {size}, which {count} devices do not divide; expected a multiple of "
                f"{count}"
            )


class Planner:
    """The pieces of a plan."""

    def __init__(self, config: Config, model: Architecture, device: Device, count: int) -> None:
        """Prepare the networks by shape; of what `fitting.fitted` chooses nothing is open."""
        self.config, self.model, self.device, self.count = config, model, device, count
        dtype = DTYPES[config.model.dtype]
        full = config.model.trainable == "full"
        frozen = {"dtype": dtype, "param_dtype": dtype}
        lora = lora_options(config)

        key: Any = OneKey()

        def network() -> nnx.Module:
            rngs, master = key, jnp.float32 if full else dtype
            unet = UNet2DConditionModel(model.unet, dtype=dtype, param_dtype=master, rngs=rngs)
            unet.gradient_checkpointing = config.model.chosen("gradient_checkpointing")
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
        height, width = config.rollout.height, config.rollout.width
        self.latent = latent_size(model.unet, model.vae, height, width)
        factor = model.vae.downscale_factor
        self.image = (factor * self.latent[0], factor * self.latent[1], 3)
        scheduler = SchedulerConfig.from_dict(model.scheduler)
        learner = make_learner(config, self.policy, scheduler, self.latent)
        assert isinstance(learner, GRPOLearner | NFTLearner)
        self.learner = learner
        self.vae = nnx.split(
            abstract_module(AutoencoderKL, model.vae, dtype=dtype, param_dtype=dtype)
        )

    @property
    def nft(self) -> bool:
        """Whether it is DiffusionNFT that is planned, and not GRPO."""
        return isinstance(self.learner, NFTLearner)

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
        function, arguments = self.update_program(size)
        return program_cost(function, *arguments)

    def sample(self, size: int) -> Cost:
        """Return the cost of drawing a microbatch."""
        function, arguments = self.sample_program(size)
        return program_cost(function, *arguments)

    def update_program(self, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the gradient of one step of a microbatch, and its arguments by shape."""
        arguments = update_arguments(
            self.learner, self.policy, self.noise(size), self.conditioning(size)
        )
        return self.learner.loss.accumulate, arguments

    def sample_program(self, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what draws a microbatch, and its arguments by shape."""
        rollout = dataclasses.replace(self.config.rollout, microbatch=size)
        config = dataclasses.replace(self.config, rollout=rollout)
        draw = (make_final_rollout if self.nft else make_rollout)(config, self.learner.policy)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        schedule, conditioning = self.learner.schedule(0), self.conditioning(size)
        parameters = self.policy.trained, self.policy.frozen
        return draw, (*parameters, schedule, self.noise(size), keys, conditioning)

    def decode(self, size: int) -> Cost:
        """Return the cost of decoding a microbatch."""
        graphdef, weights = self.vae

        def decoded(weights: Any, latents: Any) -> Any:
            return nnx.merge(graphdef, weights).decode(latents)

        return program_cost(decoded, weights, self.noise(size))

    def plan(self) -> Plan:
        """Put it together."""
        config, device, count = self.config, self.device, self.count
        rollout, options = config.rollout, config.grpo
        images = rollout.num_images // count
        chosen = images_learned_from(rollout, options) // count
        drawn, learned = rollout.images_at_once // count, options.images_at_once // count
        full = config.model.trainable == "full"
        whole, (gather, updating) = size_of(self.policy.trained), self.gathered()
        sample, update, decoded = self.sample(drawn), self.update(learned), self.decode(drawn)
        memory = self.memory({drawn: sample}, {drawn: decoded}, {learned: update})
        active, steps = self.learner.steps_learned
        updates = options.updates_per_rollout
        sweeps = sum(self.learner.sweeps)
        calls = chosen // learned * steps * updates
        share = active / rollout.num_steps  # of a rollout's forwards, in a sweep over its images
        extra = sweeps * share * chosen / images
        parts = images // drawn
        sampled = parts * self.seconds(sample)
        with_kl = 1 + self.learner.reward_kl_forwards * share  # rollouts, with one in the reward
        # GRPO sums an adapter's gradient over the devices once an update; all others each call.
        sums = calls if full or self.nft else updates
        reduced = round(2 * (count - 1) / count * whole) * sums
        communicated = reduced + (parts + self.sweep_calls()) * gather + calls * updating
        seconds = {
            "sample": with_kl * sampled,
            "decode": parts * self.seconds(decoded),
            "update": calls * device.backward * self.seconds(update) + extra * sampled,
            "communicate": communicated / device.link,
        }
        flops = {
            "sample": count * parts * with_kl * sample.flops,
            "decode": count * parts * decoded.flops,
            "update": count * (calls * update.flops + extra * parts * sample.flops),
        }
        held, limit = memory.parts(drawn, learned), USABLE * device.memory
        peak = peak_of(held)
        return Plan(
            held,
            seconds,
            flops,
            communicated,
            largest_microbatch=count * memory.most_differentiated(limit),
            fits=peak <= limit,
            warnings=self.warnings(memory, peak, limit),
        )

    def seconds(self, cost: Cost) -> float:
        """Return the time of a program by the roofline; of a gradient's, see `Device.backward`."""
        device = self.device
        half = self.config.model.dtype == "bfloat16"
        return device.seconds(cost, device.flops if half else device.flops_float32)

    def gathered(self) -> tuple[int, int]:
        """Bytes that a program gathers of what is divided: sampling's, and the update's.

        It holds them beside the shares, while it runs; what a ring sends for that is all that a
        device has not got.
        """
        fsdp, shards = self.config.mesh.fsdp, self.shards
        of_trained = size_of(self.policy.trained) - share_of(self.policy.trained, shards)
        of_frozen = size_of(self.policy.frozen) - share_of(self.policy.frozen, fsdp)
        return of_trained + of_frozen, self.policies() * of_trained + of_frozen

    @property
    def shards(self) -> int:
        """Over how many devices what is trained is divided: an adapter is whole everywhere."""
        return self.config.mesh.fsdp if self.config.model.trainable == "full" else 1

    def memory(
        self, samples: dict[int, Cost], decodes: dict[int, Cost], updates: dict[int, Cost]
    ) -> Memory:
        """Return the memory of one device as a function of the microbatches.

        Args:
            samples: images at a time → the cost of sampling, of two sizes, one or none, whose
                memory is left out.
            decodes: of decoding.
            updates: of one step's gradient.
        """
        config, count = self.config, self.count
        rollout, fsdp, shards = config.rollout, config.mesh.fsdp, self.shards
        images = rollout.num_images // count
        trained = share_of(self.policy.trained, shards)
        network = share_of(self.policy.frozen, fsdp)
        frozen = network if self.policy.reads_tokens else network + self.text_bytes()
        optimizer, _ = make_optimizer(config.optim, 1, config.run.iterations)
        state = share_of(jax.eval_shape(optimizer.init, self.policy.trained), shards)
        gather, updating = (sent * fsdp // (fsdp - 1) if sent else 0 for sent in self.gathered())

        def lanes(microbatches: int) -> int:
            """How many microbatches are at work at the same time; see `lanes.py`."""
            here = min(MOST, cores()) if self.device.backend == "cpu" and count == 1 else 1
            return min(here, microbatches)

        return Memory(
            {
                "frozen parameters": frozen + size_of(self.vae[1]),
                "trained parameters": trained,
                "reference": trained,
                **({"old policy": trained} if self.nft else {}),
                "optimizer state": state + (trained if config.optim.ema_decay is not None else 0),
                "trajectories": self.trajectory_bytes(images),
            },
            gradient=trained,
            images=images,
            learned=images_learned_from(rollout, config.grpo) // count,
            sampled=linear_peak(samples, self.sample, beside=gather),
            decoded=linear_peak(decodes, self.decode),
            updated=linear_peak(updates, self.update, beside=updating),
            slack=self.device.slack,
            lanes=lanes,
        )

    def mends(self, memory: Memory, limit: float) -> str:
        """Say what would make it fit."""
        config, count = self.config, self.count
        drawn, learned = config.rollout.images_at_once // count, config.grpo.images_at_once // count
        sizes = memory.fitting(drawn, learned, limit)
        said = ["no microbatch fits"]
        if all(sizes.values()):
            named = " and ".join(f"{name} {count * size}" for name, size in sizes.items())
            said = [f"{named} {'fits' if len(sizes) == 1 else 'fit'}"]
        if "grpo.microbatch" in sizes and not config.model.gradient_checkpointing:
            said.append("--model.gradient-checkpointing True needs less")
        if config.model.trainable == "full":
            said.append("--model.trainable lora needs less")
        return "; ".join(said)

    def warnings(self, memory: Memory, peak: int, limit: float) -> list[str]:
        """Say what will go wrong or is wasteful."""
        config = self.config
        found = []
        if peak > limit:
            found.append(
                f"it does not fit: {peak / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB; "
                f"{self.mends(memory, limit)}"
            )
        elif config.model.gradient_checkpointing and peak < limit / 3:
            found.append(
                "gradient checkpointing costs a third of the update's time, and most of the memory "
                "is free: try --model.gradient-checkpointing False"
            )
        if config.model.dtype == "float32" and self.device.backend != "cpu":
            found.append(
                "float32 on an accelerator: --model.dtype bfloat16 is several times faster"
            )
        return found

    def policies(self) -> int:
        """Return how many policies the program of the update evaluates."""
        if isinstance(self.learner, NFTLearner):  # the trained one, the old one, the reference
            return 3 if self.learner.loss.config.penalty else 2
        return 1

    def sweep_calls(self) -> int:
        """Return how many programs of an iteration evaluate recorded steps, without a gradient."""
        rollout, options = self.config.rollout, self.config.grpo
        images = images_learned_from(rollout, options)
        moving, others = self.learner.sweeps
        calls = moving * (images // options.images_at_once)
        calls += others * (images // math.gcd(rollout.images_at_once, images))
        # The KL in the reward: two whole networks are gathered each, what two adapters share once.
        policies = self.learner.reward_kl_forwards
        if self.config.model.trainable == "lora":
            policies = min(1, policies)
        return calls + policies * (rollout.num_images // rollout.images_at_once)

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
        latent, steps = int(np.prod(self.latent)), self.config.rollout.num_steps
        storage = jnp.dtype(DTYPES[self.config.rollout.storage_dtype]).itemsize
        kept, means = (steps + 1) * storage, 0
        if isinstance(self.learner, NFTLearner):
            kept = 4  # the clean latents alone
        else:
            needs = self.learner.loss.config
            means = 4 * steps * (needs.needs_reference_means + needs.needs_old_means)
        text = size_of(self.conditioning(1)[0])
        # twice: the parts of the rollout and what they are joined to
        return images * ((2 * kept + means) * latent + text + int(np.prod(self.image)))


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
