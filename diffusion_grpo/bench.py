"""How fast a run goes on this machine: the run's own functions, timed.

A `Workload` is one iteration's work, prepared as `train.py` prepares it. Each phase is called once
to compile and then timed, blocked on its result; an iteration is timed whole too, as the run
overlaps its phases.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.conditioning import conditioning_shapes, encode_prompts, of_rows
from diffusion_grpo.config import Config
from diffusion_grpo.consistency import images_learned_from
from diffusion_grpo.flops import count_flops
from diffusion_grpo.learner import Rollout, image_advantages, penalized
from diffusion_grpo.learning import GRPOLearner, make_learner
from diffusion_grpo.lora import LoRAParam
from diffusion_grpo.pipeline import (
    TrainablePolicy,
    latent_shape,
    make_decoder,
    make_policy,
)
from diffusion_grpo.preparation import (
    decode_and_score,
    decode_chunks,
    lora_options,
    make_final_rollout,
)
from diffusion_grpo.pretrained import DTYPES, StableDiffusion
from diffusion_grpo.programs import noise_steps, update_arguments
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.reward import RewardSet
from diffusion_grpo.rollout import image_keys, initial_noise
from diffusion_grpo.text_encoding import pipeline_parts

PHASES = ("encode", "sample", "sample_final", "decode", "reward", "update", "iteration")


@dataclasses.dataclass
class Timing:
    """Seconds of a phase.

    Attributes:
        first: of the first call, which compiles.
        calls: of those after it.
    """

    first: float
    calls: list[float]

    @property
    def median(self) -> float:
        """The median of the calls after the first, or the first if there are none."""
        return statistics.median(self.calls) if self.calls else self.first


class Workload:
    """One iteration of a run: prompts, rollout, decoding, rewards, advantages, update."""

    def __init__(
        self, config: Config, model: StableDiffusion, *, random_tokens: int | None = None
    ) -> None:
        """Prepare what a run prepares before its first iteration.

        Args:
            config: the run's, validated.
            model: the pipeline; with an adapter, its UNet gains the adapter's layers.
            random_tokens: n, to take random text states of this length instead of encoding prompts.
        """
        self.config, self.model = config, model
        rollout = config.rollout
        model.unet.gradient_checkpointing = config.model.gradient_checkpointing
        self.policy = make_policy(
            model,
            guidance_scale=rollout.guidance_scale,
            lora=lora_options(config),
            clip_skip=config.model.clip_skip,
            noise_steps=noise_steps(config),
        )
        self.shape = latent_shape(model, rollout.height, rollout.width)
        self.learner = make_learner(config, self.policy, model.scheduler_config, self.shape)
        self.decoder = make_decoder(model)
        self.rewards = RewardSet.load(config.training_rewards(), **config.reward_settings())
        self._draw_final = make_final_rollout(config, self.policy)

        prompts, group_size = rollout.prompts_per_iteration, rollout.images_per_prompt
        listed = load_prompts(config.prompts.train)
        self.prompts = [listed[i % len(listed)] for i in range(prompts)]
        self.index = np.repeat(np.arange(prompts), group_size)
        self.group = np.tile(np.arange(group_size), prompts)
        self.state = self.learner.init(len(listed))
        self.noise = initial_noise(
            image_keys(0, 0, self.index, self.group, "initial_noise"), self.shape
        )
        self.keys = image_keys(0, 0, self.index, self.group, "step_noise")
        self.loss_keys = image_keys(0, 0, self.index, self.group, "loss")
        self._random_text = random_tokens is not None
        if random_tokens is None:
            encoded = self.encode()
        else:
            dtype = DTYPES[config.model.dtype]
            unet, key = model.unet.config, jax.random.key(0)
            shapes = conditioning_shapes(unet, prompts + 1, random_tokens, dtype)
            drawn = {name: jax.random.normal(key, s.shape, s.dtype) for name, s in shapes.items()}
            encoded = (
                {name: rows[:-1] for name, rows in drawn.items()},
                {name: rows[-1:] for name, rows in drawn.items()},
            )
        self.conditioning = of_rows(encoded, self.index)
        self._rollout: Rollout | None = None
        self._images: Any = None

    @property
    def phases(self) -> dict[str, Callable[[], Any]]:
        """Phase → what does it once, and returns arrays to wait for."""
        phases = {name: getattr(self, name) for name in PHASES}
        if self._random_text:
            del phases["encode"]
        return phases

    def encode(self) -> Any:
        """Encode the prompts of the iteration and the negative one."""
        return encode_prompts(
            self.model,
            [prompt.text for prompt in self.prompts],
            negative_prompt=self.config.rollout.negative_prompt,
            shape=self.shape,
            clip_skip=self.config.model.clip_skip,
            tokens=self.policy.reads_tokens,
        )

    def sample(self, on_chunk: Callable[[jax.Array], None] | None = None) -> Any:
        """Draw the images' latents, as the algorithm needs them: GRPO with log-probs."""
        self._rollout = self.learner.sample(
            self.state, 0, self.noise, self.keys, self.conditioning, on_chunk=on_chunk
        )
        return self._rollout.final

    def sample_final(self) -> Any:
        """Draw the clean latents alone, as evaluation does."""
        schedule = self.learner.schedule(0)
        params = self.state.train.params
        return self._draw_final(
            params, self.policy.frozen, schedule, self.noise, self.keys, self.conditioning
        )

    def decode(self) -> Any:
        """Decode the images drawn last."""
        size = self.config.rollout.microbatch
        self._images = decode_chunks(self.decoder, self._drawn().final, size)
        return self._images

    def reward(self) -> Any:
        """Score the images decoded last."""
        if self._images is None:
            self.decode()
        texts = [self.prompts[i].text for i in self.index]
        metadata = [self.prompts[i].metadata for i in self.index]
        size = self.config.rollout.images_per_prompt
        return self.rewards(self._images, texts, metadata, group_size=size).total

    def update(self) -> Any:
        """Take the optimizer steps of an iteration on the images drawn last."""
        count = self.config.rollout.num_images
        return self._learn(self._drawn(), jnp.asarray(np.resize([1.0, -1.0], count), jnp.float32))

    def iteration(self) -> dict[str, float]:
        """Do an iteration in the run's order; seconds until sampled, scored and updated."""
        began = time.perf_counter()
        texts = [self.prompts[i].text for i in self.index]
        metadata = [self.prompts[i].metadata for i in self.index]
        size = self.config.rollout.images_per_prompt
        with self.rewards.start(texts, metadata, group_size=size) as scoring:
            chunks: list[jax.Array] = []
            self.sample(on_chunk=partial(decode_and_score, self.decoder, chunks, scoring))
            jnp.concatenate(chunks).block_until_ready()
            sampled = time.perf_counter()
            result = scoring.result()
        drawn = self._drawn()
        advantages, history = image_advantages(
            self.config.grpo,
            result.scores,
            penalized(result.total, self.state, drawn),
            self.rewards.weights,
            kept=result.kept,
            group_size=size,
            prompt_index=self.index,
            history=self.state.history,
        )
        scored = time.perf_counter()
        self.state = self.state._replace(history=history)
        jax.block_until_ready(self._learn(drawn, advantages))
        updated = time.perf_counter()
        return {
            "sample": sampled - began,
            "reward": scored - sampled,
            "update": updated - scored,
            "iteration": updated - began,
        }

    def _drawn(self) -> Rollout:
        if self._rollout is None:
            jax.block_until_ready(self.sample())
        assert self._rollout is not None
        return self._rollout

    def _learn(self, rollout: Rollout, advantages: Any) -> Any:
        self.state, _ = self.learner.learn(self.state, rollout, advantages, 0, self.loss_keys)
        return self.state.train.params

    @property
    def steps_learned(self) -> tuple[int, int]:
        """(A, K): the steps that take part, and those that are differentiated; NFT has no A."""
        if not isinstance(self.learner, GRPOLearner):
            return 0, self.config.nft.timesteps
        active = len(self.learner.plan(self.learner.schedule(0), 0).active)
        return active, self.config.grpo.gradient_steps or active

    @property
    def images_learned(self) -> int:
        """Images of an iteration that the update is given."""
        return images_learned_from(self.config.rollout, self.config.grpo)

    def flops(self) -> dict[str, float]:
        """Count the model's operations of sampling and update; recomputation does not count."""
        config = self.config
        images, steps = config.rollout.num_images, config.rollout.num_steps
        forward, both = self.network_flops()
        counted = {"forward": forward, "sample": float(images * steps * forward)}
        if isinstance(self.learner, GRPOLearner):
            active, differentiated = self.steps_learned
            sweeps = config.grpo.updates_per_rollout - 1 if config.grpo.ratio != "step" else 0
            needs = self.learner.loss.config
            sweeps += bool(needs.needs_reference_means or needs.needs_reference_log_probs)
            sweeps += needs.needs_old_means
            update = config.grpo.updates_per_rollout * differentiated * both
            counted |= {
                "forward_backward": both,
                "update": float(self.images_learned * (update + sweeps * active * forward)),
            }
        return counted

    def network_flops(self) -> tuple[float, float]:
        """Count one denoising step of one image: forward, and forward with backward."""
        network, config = self.policy.network(self.policy.trained), self.config
        pipeline_parts(network)["unet"].gradient_checkpointing = False
        plain = TrainablePolicy(
            network,
            config.rollout.guidance_scale,
            nnx.Param if config.model.trainable == "full" else LoRAParam,
            noise_steps=noise_steps(config),
        )
        learner = make_learner(config, plain, self.model.scheduler_config, self.shape)
        size = config.grpo.microbatch
        noise = self.noise[:size]
        conditioning = of_rows(self.conditioning, np.arange(len(noise)))

        def denoise(trained: Any, frozen: Any, x: Any) -> Any:
            return plain.denoiser(trained, frozen)(x, jnp.int32(1), conditioning)

        count = len(noise)
        forward = count_flops(denoise, plain.trained, plain.frozen, noise) / count
        if not isinstance(learner, GRPOLearner):
            return forward, 0.0
        arguments = update_arguments(learner, plain, noise, conditioning)
        return forward, count_flops(learner.loss.accumulate, *arguments) / count

    def memory(self) -> dict[str, int]:
        """Return bytes: the device's peak where it counts, else of the process and the update."""
        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return {"device_peak": int(stats["peak_bytes_in_use"])}
        found = {"process_peak": process_peak()}
        if isinstance(self.learner, GRPOLearner):
            size = self.config.grpo.microbatch
            noise = self.noise[:size]
            conditioning = of_rows(self.conditioning, np.arange(len(noise)))
            arguments = update_arguments(self.learner, self.policy, noise, conditioning)
            analysis = self.learner.loss.accumulate.lower(*arguments).compile().memory_analysis()
            found["update_temporary"] = int(analysis.temp_size_in_bytes)
            found["update_arguments"] = int(analysis.argument_size_in_bytes)
        return found


def process_peak() -> int:
    """Return the largest memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def matrix_rate(dtype: Any, *, size: int | None = None, repeats: int = 5) -> float:
    """Measure the device's rate of a matrix product, in operations a second; the best of some.

    Args:
        dtype: of the matrices.
        size: of the square matrices; by default 8192 on an accelerator and 1024 on a CPU.
        repeats: timed calls, of several products each.
    """
    accelerator = jax.default_backend() != "cpu"
    size = size or (8192 if accelerator else 1024)
    count = 16 if accelerator else 4
    key = jax.random.key(0)
    matrix = jax.random.normal(key, (size, size), jnp.float32) / jnp.float32(size) ** 0.5
    matrix = matrix.astype(dtype)

    @jax.jit
    def products(x: Any) -> Any:
        for _ in range(count):
            x = x @ matrix
        return x

    timing = timed(lambda: products(matrix), repeats)
    return count * 2 * size**3 / min(timing.calls)


def timed(call: Callable[[], Any], repeats: int) -> Timing:
    """Time a call that returns arrays, blocked on them, and once more before that."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return Timing(seconds[0], seconds[1:])


def measure(
    work: Workload,
    *,
    repeats: int,
    phases: Sequence[str] = PHASES,
    on_result: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Time the phases of an iteration.

    Args:
        work: the iteration.
        repeats: timed calls of each phase, after the first.
        phases: which of `PHASES`.
        on_result: called with all that is known so far, after every phase.

    Returns:
        The record that `diffusion-grpo bench --json` writes; times in seconds, rates in 1/s.
    """
    record: dict[str, Any] = describe(work)
    rates = record["rates"] = {}
    images = work.config.rollout.num_images
    for name, call in work.phases.items():
        if name not in phases:
            continue
        if name == "iteration":
            parts = [work.iteration() for _ in range(repeats + 1)]
            timing = Timing(parts[0]["iteration"], [part["iteration"] for part in parts[1:]])
            record["iterations"] = parts
        else:
            timing = timed(call, repeats)
        record["seconds"][name] = dataclasses.asdict(timing) | {"median": timing.median}
        count, unit = images, "images/s"
        if name == "encode":
            count, unit = work.config.rollout.prompts_per_iteration + 1, "prompts/s"
        elif name == "update":
            count, unit = work.images_learned * work.steps_learned[1], "policy steps/s"
            count *= work.config.grpo.updates_per_rollout
        rates[name] = {"rate": count / timing.median, "unit": unit}
        record["memory"] = work.memory() if name == "update" else record.get("memory", {})
        on_result(record)
    record["memory"] = record.get("memory", {}) | work.memory()
    record["flops"] = flops = work.flops()
    record["matrix_flops_per_second"] = rate = matrix_rate(DTYPES[work.config.model.dtype])
    record["mfu"] = {
        name: flops[name] / record["seconds"][name]["median"] / rate
        for name in ("sample", "update")
        if name in flops and name in record["seconds"]
    }
    on_result(record)
    return record


def describe(work: Workload) -> dict[str, Any]:
    """Return what is measured and on what, to be filled with the measurements."""
    config, device = work.config, jax.local_devices()[0]
    active, differentiated = work.steps_learned
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.local_device_count(),
            "cores": cores(),
            "matrix_dtype": config.model.dtype,
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "work": {
            "images": config.rollout.num_images,
            "images_learned": work.images_learned,
            "steps": config.rollout.num_steps,
            "steps_learned": differentiated,
            "steps_active": active,
            "updates": config.grpo.updates_per_rollout,
            "microbatch": config.rollout.microbatch,
            "update_microbatch": config.grpo.microbatch,
            "latent": list(work.shape),
            "guidance_scale": config.rollout.guidance_scale,
            "dtype": config.model.dtype,
            "trainable": config.model.trainable,
            "lora_rank": config.model.lora_rank,
            "gradient_checkpointing": config.model.gradient_checkpointing,
            "reference": config.grpo.beta > 0,
        },
        "seconds": {},
    }


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(record: Mapping[str, Any]) -> str:
    """Return a record as lines of text."""
    work, device = record["work"], record["device"]
    lines = [
        f"{device['count']} x {device['kind']} ({device['platform']}), {work['dtype']}, "
        f"{work['images']} images of {work['steps']} steps, {work['steps_learned']} learned from "
        f"in {work['images_learned']} of them",
        f"{'phase':<14}{'first call':>12}{'median':>12}{'rate':>24}{'MFU':>8}",
    ]
    for name, seconds in record["seconds"].items():
        rate = record["rates"][name]
        share = record.get("mfu", {}).get(name)
        lines.append(
            f"{name:<14}{seconds['first']:>10.3f} s{seconds['median']:>10.4f} s"
            f"{rate['rate']:>9.4g} {rate['unit']:<14}{'' if share is None else f'{share:>7.1%}'}"
        )
    for name, size in record.get("memory", {}).items():
        lines.append(f"{name.replace('_', ' ') + ' memory':<26}{size / 2**30:>10.3f} GiB")
    if "matrix_flops_per_second" in record:
        rate = record["matrix_flops_per_second"]
        lines.append(f"{'matrix products':<26}{rate / 1e12:>10.3f} TFLOP/s")
    for name, peer in record.get("peers", {}).items():
        if "error" in peer:
            lines.append(f"torch {name}: {peer['error']}")
        for phase, ratio in peer.get("ratios", {}).items():
            lines.append(
                f"torch {name:<9}{phase:<12}{ratio['theirs']:>10.4f} s, ours {ratio['ours']:.4f} s"
                f": {ratio['median']:.2f} times ({', '.join(f'{r:.2f}' for r in ratio['pairs'])})"
            )
    return "\n".join(lines)
