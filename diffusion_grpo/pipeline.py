"""From texts to pictures.

The guided denoiser of a checkpoint, decoding, `generate`. Networks are split
into structure (closed over, compiled) and parameters (passed), so that compiled programs hold no
weights and one program serves the policy, the old policy and the reference.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.conditioning import Conditioning, encode_prompts, every, of_rows
from diffusion_grpo.errors import UsageError
from diffusion_grpo.lora import LoRAParam, attach_lora
from diffusion_grpo.mesh import by_rows, gathered, on_devices, resident, shards
from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.models.vae import VAEConfig
from diffusion_grpo.pretrained import StableDiffusion, image_size
from diffusion_grpo.program_cache import network_jit, shared_programs
from diffusion_grpo.rollout import (
    Denoiser,
    guided,
    image_keys,
    initial_noise,
    purpose_key,
    sample_final,
)
from diffusion_grpo.samplers import Solver, make_solver, solve
from diffusion_grpo.sampling import SamplingDefaults
from diffusion_grpo.schedule import Schedule, scaled_noise
from diffusion_grpo.text_encoding import TextConditionedUNet


class LoRAOptions(TypedDict):
    """An adapter as `attach_lora` takes it."""

    targets: Sequence[str]
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class PolicyStructure:
    """All of a policy but its parameters: what is compiled in.

    Attributes:
        graphdef: of the network.
        guidance_scale: s of classifier-free guidance.
        learns_noise: whether the trained parameters hold a log noise scale of each step.
        group: see `TrainablePolicy.of_groups`.
        dtype: that the network computes in.
    """

    graphdef: Any
    guidance_scale: float
    learns_noise: bool = False
    group: int = 1
    dtype: Any = jnp.float32

    def denoiser(self, trained: Any, frozen: Any) -> Denoiser:
        """Return the guided denoiser with the given parameters; its conditioning is by image."""
        network, frozen = gathered(self.parameters(trained)), gathered(frozen)
        # Once here, and not by each layer at each step: of hundreds of adapters of SD 1.5 every
        # cast would be a GPU kernel of its own.
        network = jax.tree.map_with_path(self._as_computed_with, network)

        def apply(sample: Array, timesteps: Array, conditioning: Conditioning) -> Array:
            return nnx.merge(self.graphdef, network, frozen)(sample, timesteps, **conditioning)

        denoise = guided(apply, self.guidance_scale)
        if self.group == 1:
            return denoise

        def by_prompt(latents: Array, timestep: Array, conditioning: Any) -> Array:
            prompts, negative = conditioning
            each = math.gcd(self.group, len(latents))
            return denoise(latents, timestep, (every(prompts, each), negative))

        return by_prompt

    def _as_computed_with(self, path: tuple[Any, ...], leaf: Array) -> Array:
        """Cast what linear layers and convolutions would cast; norms take their own in float32."""
        names = {str(getattr(key, "key", "")) for key in path[-2:]}
        multiplies = names & {"kernel", "lora_a", "lora_b"}
        return leaf.astype(self.dtype) if multiplies else leaf

    def noise(self, trained: Any, schedule: Schedule) -> Schedule:
        """Return the rollout's schedule with the policy's own noise, where it learns one."""
        return scaled_noise(schedule, trained["log_noise_scale"]) if self.learns_noise else schedule

    def parameters(self, trained: Any) -> Any:
        """Return the trained parameters that are the network's."""
        return trained["unet"] if self.learns_noise else trained


class TrainablePolicy:
    """A UNet, or one behind its text encoders, split into what is trained and what is not.

    Attributes:
        structure: what is compiled in.
        trained: the initial trained parameters, float32; they are the reference policy's too.
        frozen: the other parameters.
        reads_tokens: whether the network is conditioned on tokens, and not on text states.
    """

    def __init__(
        self,
        network: nnx.Module,
        guidance_scale: float,
        trainable: Any = nnx.Param,
        *,
        noise_steps: int | None = None,
    ):
        """Split a network.

        Args:
            network: a UNet or a `TextConditionedUNet`; adapters already attached.
            guidance_scale: s of classifier-free guidance.
            trainable: NNX filter of the trained parameters (`LoRAParam` for an adapter).
            noise_steps: T, to train a log noise scale of each of the rollout's steps too, from 0;
                None leaves the noise as scheduled.
        """
        self.reads_tokens = isinstance(network, TextConditionedUNet)
        graphdef, trained, self.frozen = nnx.split(network, trainable, ...)
        unet = network.unet if isinstance(network, TextConditionedUNet) else network
        self.structure = PolicyStructure(
            graphdef,
            guidance_scale,
            noise_steps is not None,
            dtype=getattr(unet, "dtype", jnp.float32),
        )
        self.trained: Any = trained
        if noise_steps is not None:
            self.trained = {
                "unet": trained,
                "log_noise_scale": jnp.zeros(noise_steps, jnp.float32),
            }

    def of_groups(self, size: int) -> TrainablePolicy:
        """Return the policy for batches in which every `size` consecutive images have one prompt.

        What its denoisers compute of a prompt alone (the keys and values of cross-attention, the
        text encoders where they are trained) they compute once for these images. A smaller batch
        has to be a whole part of a larger one's, so that the images that share a prompt are the
        greatest common divisor of its size and `size`.
        """
        grouped = copy.copy(self)
        grouped.structure = dataclasses.replace(self.structure, group=size)
        return grouped

    def denoiser(self, trained: Any, frozen: Any) -> Denoiser:
        """Return the guided denoiser with the given parameters; its conditioning is by image."""
        return self.structure.denoiser(trained, frozen)

    def noise(self, trained: Any, schedule: Schedule) -> Schedule:
        """Return the rollout's schedule with the policy's own noise, where it learns one."""
        return self.structure.noise(trained, schedule)

    def network(self, trained: Any, frozen: Any = None) -> Any:
        """Return the network with the given trained parameters, and the others as they are."""
        others = self.frozen if frozen is None else frozen
        parameters = self.structure.parameters(trained)
        return nnx.merge(self.structure.graphdef, parameters, others)

    @property
    def learns_noise(self) -> bool:
        """Whether the trained parameters hold a log noise scale of each step."""
        return self.structure.learns_noise


def make_policy(
    model: StableDiffusion,
    *,
    guidance_scale: float,
    lora: Mapping[str, LoRAOptions] | None = None,
    clip_skip: int = 0,
    noise_steps: int | None = None,
    seed: int = 0,
) -> TrainablePolicy:
    """Prepare a checkpoint's UNet for training, and its text encoders where they have adapters.

    Args:
        model: the pipeline; with an adapter, its networks gain the adapter's layers.
        guidance_scale: s of classifier-free guidance, in sampling and update alike.
        lora: component → its adapter: of `unet`, and of the text encoders where they are trained
            (one that the pipeline lacks is left out); None trains all parameters of the UNet.
        clip_skip: layers of the text encoders to skip, where they are trained.
        noise_steps: T, to learn a noise scale of each of the rollout's steps; None for none.
        seed: of the adapter's initial values.
    """
    if lora is None:
        return TrainablePolicy(model.unet, guidance_scale, noise_steps=noise_steps)
    parts = {name: getattr(model, name) for name in lora}
    rngs = nnx.Rngs(purpose_key(seed, "adapter"))
    network = adapted_network(parts, lora, clip_skip=clip_skip, rngs=rngs)
    policy = TrainablePolicy(network, guidance_scale, LoRAParam, noise_steps=noise_steps)
    if policy.reads_tokens:  # text encoders are loaded to the host, where each is used once
        policy.frozen = on_devices(policy.frozen)
    return policy


def adapted_network(
    parts: Mapping[str, Any],
    lora: Mapping[str, LoRAOptions],
    *,
    clip_skip: int,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Attach adapters to the components of a pipeline, in place; see `make_policy`.

    Returns:
        The UNet, or, where there are others, a `TextConditionedUNet` of them all.
    """
    present = {name: part for name, part in parts.items() if part is not None}
    for name, part in present.items():
        attach_lora(part, rngs=rngs, **lora[name])
    unet = present.pop("unet")
    return TextConditionedUNet(unet, present, clip_skip=clip_skip) if present else unet


def make_decoder(model: StableDiffusion) -> Callable[[Float[Array, "B h w c"]], Any]:
    """Compile latents → uint8 images `[B, H, W, 3]`, rounded once, for rewards and files."""
    graphdef, weights = nnx.split(model.vae)
    decode = _decoder(graphdef, model.vae.config.scaling_factor)

    def resident_decode(latents: Array) -> Array:
        with resident():
            return decode(weights, latents)

    return resident_decode


@shared_programs
def _decoder(graphdef: Any, scaling: float) -> Callable[..., Array]:
    @jax.jit
    def decode(weights: Any, latents: Array) -> Array:
        images = nnx.merge(graphdef, weights).decode(latents.astype(jnp.float32) / scaling)
        levels = jnp.round((images.astype(jnp.float32) / 2 + 0.5).clip(0, 1) * 255)
        return by_rows(levels.astype(jnp.uint8))

    return decode


def latent_shape(
    model: StableDiffusion, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """Return (h, w, c) of the latents for an image size in pixels (default: the checkpoint's).

    Raises:
        UsageError: the size is not a multiple of the VAE's downscaling, or it is not given and the
            checkpoint states none.
    """
    return latent_size(model.unet.config, model.vae.config, height, width)


def latent_size(
    unet: UNetConfig, vae: VAEConfig, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """Return (h, w, c) as `latent_shape`, by the networks' configurations alone.

    Raises:
        UsageError: as there.
    """
    factor = vae.downscale_factor
    sizes = []
    for i, (name, given) in enumerate((("height", height), ("width", width))):
        pixels = image_size(unet, vae)[i] if given is None else given
        if pixels < factor or pixels % factor:
            raise UsageError(
                f"{name} is {pixels} pixels; expected a multiple of {factor}, the VAE's downscaling"
            )
        sizes.append(pixels // factor)
    return sizes[0], sizes[1], unet.in_channels


def generate(
    model: StableDiffusion,
    prompts: Sequence[str],
    *,
    num_steps: int = SamplingDefaults.num_steps,
    guidance_scale: float = SamplingDefaults.guidance_scale,
    sampler: str = "ddim",
    eta: float = 0.0,
    negative_prompt: str = "",
    clip_skip: int = 0,
    seed: int = 0,
    image_index: Sequence[int] | None = None,
    prompt_index: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    latents: Float[Array, "B h w c"] | None = None,
    batch_size: int = 16,
    on_images: Callable[[int], None] | None = None,
    on_previews: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Draw one image a prompt.

    Args:
        model: the pipeline.
        prompts: B texts.
        num_steps: T.
        guidance_scale: s.
        sampler: one of `sampling.SAMPLERS`.
        eta: η of DDIM; 0 is deterministic.
        negative_prompt: text of the unconditional half.
        clip_skip: layers of the text encoders to skip; see `encode_prompts`.
        seed: of the noise; a picture depends on (seed, prompt_index, image_index), not on the
            batch.
        image_index: each image's number among those of its prompt; default 0, 1, ….
        prompt_index: each prompt's number; default 0 for all.
        height: in pixels; default the checkpoint's.
        width: in pixels; default the checkpoint's.
        latents: initial noise x_T, instead of `seed`'s.
        batch_size: images at a time.
        on_images: called with the number of images done so far.
        on_previews: called with each batch's predictions of the picture, x̂₀ decoded, one a step:
            uint8 `[T, b, H, W, 3]`.

    Returns:
        uint8 `[B, H, W, 3]`.

    Raises:
        UsageError: an argument is out of its range, or has not one entry a prompt.
    """
    policy = TrainablePolicy(model.unet, guidance_scale)
    solver = make_solver(model.scheduler_config, sampler, num_steps, eta=eta)
    count = len(prompts)
    _check_counts(prompts, image_index=image_index, prompt_index=prompt_index)
    channels = model.unet.config.in_channels
    if latents is not None and (latents.ndim != 4 or latents.shape[::3] != (count, channels)):
        raise UsageError(
            f"latents have shape {latents.shape}; expected ({count}, h, w, {channels}): one a "
            "prompt, channels last"
        )
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; expected 1 or more")
    if latents is None:
        shape = latent_shape(model, height, width)
    else:
        shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    conditioning = encode_prompts(
        model, prompts, negative_prompt=negative_prompt, shape=shape, clip_skip=clip_skip
    )
    index = np.arange(count) if image_index is None else np.asarray(image_index)
    group = np.zeros(count, int) if prompt_index is None else np.asarray(prompt_index)
    keys = image_keys(seed, 0, group, index, "evaluation_step")
    if latents is None:
        start = image_keys(seed, 0, group, index, "evaluation_initial")
        latents = initial_noise(start, shape)
    decode = make_decoder(model)
    draw = make_solved(policy.structure, previews=on_previews is not None)
    images = []
    for rows in padded_chunks(count, batch_size):
        part = (latents[rows], keys[rows], of_rows(conditioning, rows))
        final, previews = draw(policy.trained, policy.frozen, solver, *part)
        images.append(np.asarray(decode(final)))
        if on_previews is not None:
            left = min(len(rows), count - sum(map(len, images[:-1])))
            on_previews(np.stack([np.asarray(decode(step))[:left] for step in previews]))
        if on_images is not None:
            on_images(min(count, sum(map(len, images))))
    return np.concatenate(images)[:count]


def _check_counts(prompts: Sequence[str], **numbers: Sequence[int] | None) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise UsageError(f"prompts is {prompts!r}; expected a list of texts, one an image")
    for name, given in numbers.items():
        if given is not None and len(given) != len(prompts):
            raise UsageError(
                f"{name} has {len(given)} entries for {len(prompts)} prompts; expected one each"
            )


@shared_programs
def make_solved(policy: PolicyStructure, *, previews: bool = False) -> Callable[..., Any]:
    """Compile `samplers.solve` of a policy.

    Returns:
        (trained, frozen, solver, initial, keys, conditioning) → (x_0, x̂₀ of every step).
    """

    @network_jit
    def draw(
        trained: Any,
        frozen: Any,
        solver: Solver,
        initial: Array,
        keys: Array,
        conditioning: Any,
    ) -> tuple[Array, Array]:
        denoiser = policy.denoiser(trained, frozen)
        return solve(denoiser, solver, initial, keys, conditioning, previews=previews)

    return draw


@shared_programs
def make_sampler(policy: PolicyStructure) -> Callable[..., Array]:
    """Compile `sample_final` of a policy.

    Returns:
        (trained, frozen, schedule, initial, keys, conditioning) → x_0.
    """

    @network_jit
    def draw(
        trained: Any,
        frozen: Any,
        schedule: Schedule,
        initial: Array,
        keys: Array,
        conditioning: Any,
    ) -> Array:
        return sample_final(policy.denoiser(trained, frozen), schedule, initial, keys, conditioning)

    return draw


def padded_chunks(count: int, size: int) -> list[np.ndarray]:
    """Return row numbers in chunks of one size, so that one program serves all.

    The last chunk is padded with its last row; each divides over the devices.
    """
    size = -(-min(size, count) // shards()) * shards()
    rows = np.arange(-(-count // size) * size).clip(max=count - 1)
    return list(rows.reshape(-1, size))
