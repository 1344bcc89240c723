"""An iteration of a run as `bench` calls it: whole, or a phase at a time.

It is prepared as `train.py` prepares it, of the functions that a run calls.
"""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.conditioning import conditioning_shapes, encode_prompts, of_rows
from diffusion_grpo.config import Config
from diffusion_grpo.consistency import images_learned_from
from diffusion_grpo.flops import count_flops
from diffusion_grpo.learner import Rollout, image_advantages, kl_penalty
from diffusion_grpo.learning import GRPOLearner, NFTLearner, make_learner
from diffusion_grpo.lora import LoRAParam
from diffusion_grpo.microbatches import (
    Output,
    decode_chunks,
    decoded_and_scored,
    make_final_rollout,
)
from diffusion_grpo.pipeline import (
    TrainablePolicy,
    latent_shape,
    make_decoder,
    make_policy,
)
from diffusion_grpo.preparation import lora_options
from diffusion_grpo.pretrained import DTYPES, StableDiffusion
from diffusion_grpo.programs import noise_steps, update_arguments
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.reward import RewardSet
from diffusion_grpo.rollout import image_keys, initial_noise
from diffusion_grpo.text_encoding import pipeline_parts

PHASES = ("encode", "sample", "sample_final", "decode", "reward", "update", "iteration")


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
        model.unet.gradient_checkpointing = config.model.chosen("gradient_checkpointing")
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
        self.state = self.learner.init(len(listed), self.rewards.weight_of)
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

    def sample(self, output: Output | None = None) -> Any:
        """Draw the images' latents, as the algorithm needs them: GRPO with log-probs."""
        self._rollout = self.learner.sample(
            self.state, 0, self.noise, self.keys, self.conditioning, output=output
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
        size = self.config.rollout.images_at_once
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
            self.sample(output=decoded_and_scored(self.decoder, chunks, scoring))
            drawn = self._drawn()
            jax.block_until_ready((jnp.concatenate(chunks), drawn.kl))
            sampled = time.perf_counter()
            result = scoring.result()
        advantages, history = image_advantages(
            self.config.grpo,
            result.scores,
            result.total,
            self.rewards.weights,
            penalty=kl_penalty(self.state, drawn),
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
    def images_learned(self) -> int:
        """Images of an iteration that the update is given."""
        return images_learned_from(self.config.rollout, self.config.grpo)

    def flops(self) -> dict[str, float]:
        """Count the model's operations of sampling and update; recomputation does not count."""
        config = self.config
        images, steps = config.rollout.num_images, config.rollout.num_steps
        forward, both = self.network_flops()
        counted = {"forward": forward, "sample": float(images * steps * forward)}
        active, differentiated = self.learner.steps_learned
        sweeps = sum(self.learner.sweeps)
        counted["sample"] += float(images * self.learner.reward_kl_forwards * active * forward)
        update = config.grpo.updates_per_rollout * differentiated * both
        counted |= {
            "forward_backward": both,
            "update": float(self.images_learned * (update + sweeps * active * forward)),
        }
        return counted

    def network_flops(self) -> tuple[float, float]:
        """Count one denoising step of one image: forward, and what its gradient takes.

        Which is forward and backward, and with DiffusionNFT the other policies' forward.
        """
        network, config = self.policy.network(self.policy.trained), self.config
        pipeline_parts(network)["unet"].gradient_checkpointing = False
        plain = TrainablePolicy(
            network,
            config.rollout.guidance_scale,
            nnx.Param if config.model.trainable == "full" else LoRAParam,
            noise_steps=noise_steps(config),
        )
        learner = make_learner(config, plain, self.model.scheduler_config, self.shape)
        size = config.grpo.images_at_once
        noise = self.noise[:size]
        conditioning = of_rows(self.conditioning, np.arange(len(noise)))

        def denoise(trained: Any, frozen: Any, x: Any) -> Any:
            denoiser = learner.policy.denoiser(trained, frozen)
            return denoiser(x, jnp.int32(1), conditioning)

        count = len(noise)
        forward = count_flops(denoise, plain.trained, plain.frozen, noise) / count
        assert isinstance(learner, GRPOLearner | NFTLearner)
        arguments = update_arguments(learner, plain, noise, conditioning)
        return forward, count_flops(learner.loss.accumulate, *arguments) / count

    def memory(self) -> dict[str, int]:
        """Return bytes: the device's peak where it counts, else of the process and the update."""
        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return {"device_peak": int(stats["peak_bytes_in_use"])}
        assert isinstance(self.learner, GRPOLearner | NFTLearner)
        size = self.config.grpo.images_at_once
        noise = self.noise[:size]
        conditioning = of_rows(self.conditioning, np.arange(len(noise)))
        arguments = update_arguments(self.learner, self.policy, noise, conditioning)
        analysis = self.learner.loss.accumulate.lower(*arguments).compile().memory_analysis()
        return {
            "process_peak": process_peak(),
            "update_temporary": int(analysis.temp_size_in_bytes),
            "update_arguments": int(analysis.argument_size_in_bytes),
        }


def process_peak() -> int:
    """Return the largest memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
