"""Architectures, published or a checkpoint's, and random weights: what speed and memory need.

The configurations are those that the checkpoints' own JSON files state. Speed and memory do not
depend on the weights' values, so random ones of a sensible size stand in for the trained ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.components import TextEncoder
from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.pretrained import (
    StableDiffusion,
    check_fit,
    local_directory,
    read_unet_config,
)
from diffusion_grpo.schedule import SchedulerConfig
from diffusion_grpo.tensors import abstract_module

POOL = 1 << 22  # random numbers drawn; leaves larger than this repeat them


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The networks of a published text-to-image pipeline.

    Attributes:
        unet: of the denoising network.
        vae: of the autoencoder.
        scheduler: the noise schedule, as `scheduler_config.json` has it.
        text_encoder: of CLIP's text tower, fields of `CLIPTextConfig`.
        text_encoder_2: of a second one, or none.
        tokens: n, the length of the text states.
    """

    unet: UNetConfig
    vae: VAEConfig
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any]
    tokens: int = 77
    text_encoder_2: dict[str, Any] | None = None


_VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_OPENCLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

# Rombach et al. 2022, and Podell et al. 2023.
ARCHITECTURES = {
    "sd15": Architecture(
        UNetConfig(sample_size=64, cross_attention_dim=768),
        _VAE,
        {"_class_name": "DDIMScheduler"} | _SCHEDULER,
        _CLIP_L,
    ),
    "sdxl": Architecture(
        UNetConfig(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        dataclasses.replace(_VAE, sample_size=1024, scaling_factor=0.13025),
        {"_class_name": "EulerDiscreteScheduler"} | _SCHEDULER,
        _CLIP_L,
        text_encoder_2=_OPENCLIP_BIG_G,
    ),
}

# Checkpoints whose networks these are.
HUB_IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


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
    directory = local_directory(name, revision=revision, layout="configs")

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


def text_networks(model: Architecture) -> dict[str, tuple[type[TextEncoder], Any]]:
    """Return the classes and configurations of the text encoders by their folders' names."""
    import transformers

    found: dict[str, tuple[type[TextEncoder], Any]] = {
        "text_encoder": (CLIPTextModel, transformers.CLIPTextConfig(**model.text_encoder))
    }
    if model.text_encoder_2 is not None:
        config = transformers.CLIPTextConfig(**model.text_encoder_2)
        found["text_encoder_2"] = (CLIPTextModelWithProjection, config)
    return found


def random_pipeline(
    model: Architecture, *, dtype: Any, unet_param_dtype: Any | None = None
) -> StableDiffusion:
    """Build the networks with random weights; there is no tokenizer, so no text can be encoded.

    Args:
        model: which networks.
        dtype: compute dtype, and that of the parameters.
        unet_param_dtype: of the UNet's parameters, if it differs.
    """
    kw = {"dtype": dtype, "param_dtype": dtype}
    unet_kw = kw | {"param_dtype": dtype if unet_param_dtype is None else unet_param_dtype}
    kind, text = text_networks(model)["text_encoder"]
    return StableDiffusion(
        unet=random_module(UNet2DConditionModel, model.unet, **unet_kw),
        vae=random_module(AutoencoderKL, model.vae, **kw),
        text_encoder=random_module(kind, text, **kw),
        tokenizer=None,
        scheduler_config=SchedulerConfig.from_dict(model.scheduler),
        configs={},
    )


def random_module(kind: Any, config: Any, **kw: Any) -> Any:
    """Build a network whose parameters are random: kernels of variance 1/inputs, norms at rest.

    Nothing is compiled and no initializer runs: the parameters of Stable Diffusion's UNet are there
    in seconds.

    Args:
        kind: a module's class, called as `kind(config, rngs=…, **kw)`.
        config: its configuration.
        **kw: `dtype` and `param_dtype`.
    """
    module = abstract_module(kind, config, **kw)
    graphdef, shapes = nnx.split(module)
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)

    def value(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = next(str(k.key) for k in reversed(path) if isinstance(k, jax.tree_util.DictKey))
        if name in ("bias", "scale"):
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        count = math.prod(leaf.shape)
        inputs = count // leaf.shape[-1] if name == "kernel" else 2500  # 0.02 of an embedding
        numbers = np.resize(pool, count).reshape(leaf.shape) / np.float32(math.sqrt(inputs))
        return jnp.asarray(numbers.astype(leaf.dtype))

    state = jax.tree_util.tree_map_with_path(value, nnx.to_pure_dict(shapes))
    nnx.replace_by_pure_dict(shapes, state)
    return nnx.merge(graphdef, shapes)
