"""Stable Diffusion pipelines in the Diffusers layout ⇄ NNX modules.

One path for 1.x, 2.x and SDXL: what differs is what `model_index.json` and the components'
configurations say. What is missing, left over or not supported is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffusion_grpo.components import TextEncoder, load_text_encoder, load_tokenizer, read_json
from diffusion_grpo.components import check_clip as check_clip
from diffusion_grpo.components import load_clip as load_clip
from diffusion_grpo.components import local_directory as local_directory
from diffusion_grpo.components import save_module as save_module
from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.sampling import SamplingDefaults, read_sampling, write_sampling
from diffusion_grpo.schedule import SchedulerConfig
from diffusion_grpo.scheduler_config import PIPELINE_CORRECTIONS
from diffusion_grpo.tensor_files import TRANSFORMERS_STEM, has_variant, read_safetensors
from diffusion_grpo.tensors import checkpoint_slots as checkpoint_slots
from diffusion_grpo.tensors import load_tensors
from diffusion_grpo.tensors import module_tensors as module_tensors

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

TIME_IDS = 6  # height and width of the original, top and left of the crop, height and width


@dataclasses.dataclass
class StableDiffusion:
    """A text-to-image pipeline in memory, as Diffusers' `StableDiffusion(XL)Pipeline` writes it.

    Attributes:
        unet: the denoising network.
        vae: the autoencoder.
        text_encoder: the CLIP text encoder; its parameters may lie in the host's memory.
        tokenizer: transformers' CLIPTokenizer.
        scheduler_config: noise schedule and prediction type.
        configs: each component's JSON as read, written back by `save_pretrained`.
        source: the directory it was read from.
        sampling: what it is meant to be sampled with, if it says so.
        text_encoder_2: the second text encoder, whose projected output the UNet is given too.
        tokenizer_2: its tokenizer.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Any
    scheduler_config: SchedulerConfig
    configs: dict[str, dict[str, Any]]
    source: str = ""
    sampling: SamplingDefaults | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: Any = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        unet_param_dtype: Any | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> StableDiffusion:
        """Load a pipeline in the Diffusers layout.

        The text encoders' parameters stay in the host's memory: they are on the device only while
        prompts are encoded. What the pipeline's class corrects in old files as it is built is
        corrected here too, in memory: see `SchedulerConfig.from_dict` and `read_unet_config`.

        Args:
            name_or_path: a directory, the name of a shipped checkpoint, or a hub id.
            dtype: the compute dtype of all networks.
            param_dtype: the dtype their parameters are held in.
            unet_param_dtype: the UNet's, if it differs (float32 master weights while the rest is
                bfloat16).
            revision: hub revision.
            variant: of the weight files, such as `fp16`; None takes those without one. Components
                that lack it are read without it, and a warning names them.

        Raises:
            UsageError: a file or tensor is missing, left over, misshapen or unsupported; the
                message names it. No component has the variant.
        """
        directory = local_directory(name_or_path, revision=revision, variant=variant)
        index = check_layout(directory)
        encoders = _encoders(index)
        configs = {"model_index": index} | {
            part: read_json(directory / part / "config.json") for part in ("unet", "vae", *encoders)
        }
        configs["scheduler"] = read_json(directory / "scheduler" / "scheduler_config.json")
        pipeline = str(index.get("_class_name"))
        unet_config = read_unet_config(configs["unet"], pipeline)
        vae_config = VAEConfig.from_dict(configs["vae"])
        check_fit(directory, unet_config, vae_config, [configs[part] for part in encoders])
        scheduler_config = SchedulerConfig.from_dict(configs["scheduler"], pipeline=pipeline)
        sampling = read_sampling(directory)
        variants = _variants(directory, ("unet", "vae", *encoders), variant)
        kw = {"dtype": dtype, "param_dtype": param_dtype}
        unet_kw = kw if unet_param_dtype is None else kw | {"param_dtype": unet_param_dtype}

        def load(kind: Any, part: str, config: Any, kw: dict[str, Any]) -> Any:
            tensors = read_safetensors(directory / part, variant=variants[part])
            return load_tensors(kind, config, tensors, source=str(directory / part), **kw)

        texts = {
            part: load_text_encoder(
                directory / part, kind, variant=variants[part], on_host=True, **kw
            )
            for part, kind in encoders.items()
        }
        tokenizers = {part: load_tokenizer(directory / part) for part in map(_tokenizer, encoders)}
        return cls(
            unet=load(UNet2DConditionModel, "unet", unet_config, unet_kw),
            vae=load(AutoencoderKL, "vae", vae_config, kw),
            scheduler_config=scheduler_config,
            configs=configs,
            source=str(directory),
            sampling=sampling,
            **texts,
            **tokenizers,
        )

    @property
    def encoders(self) -> list[tuple[Any, TextEncoder]]:
        """The tokenizers and text encoders whose hidden states the UNet is given, in order."""
        both = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return [(tokenizer, encoder) for tokenizer, encoder in both if encoder is not None]

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether no negative prompt means embeddings of 0, and not those of the empty text."""
        index = self.configs["model_index"]
        return bool(index.get("force_zeros_for_empty_prompt", self.text_encoder_2 is not None))

    @property
    def image_size(self) -> tuple[int, int]:
        """The (height, width) of the images the checkpoint was trained for, in pixels."""
        return image_size(self.unet.config, self.vae.config)

    def save_pretrained(self, directory: str | Path, *, dtype: Any | None = None) -> None:
        """Write the pipeline as the `from_pretrained` of its Diffusers class loads it.

        A component above 5 GB is written in several files. Tokenizers are written for Transformers
        5 (`tokenizer.json`) and 4 (`vocab.json` and `merges.txt`, copied from where a tokenizer was
        read if they are there).

        Args:
            directory: where; made if absent.
            dtype: the dtype of the written weights (default: as they are held).
        """
        directory = Path(directory)
        save_module(self.unet, directory / "unet", self.configs["unet"], dtype=dtype)
        save_module(self.vae, directory / "vae", self.configs["vae"], dtype=dtype)
        for part in _encoders(self.configs["model_index"]):
            encoder, config = getattr(self, part), self.configs[part]
            save_module(encoder, directory / part, config, stem=TRANSFORMERS_STEM, dtype=dtype)
            _save_tokenizer(getattr(self, _tokenizer(part)), directory / _tokenizer(part))
        (directory / "scheduler").mkdir(exist_ok=True)
        for name, config in (
            ("scheduler/scheduler_config.json", self.configs["scheduler"]),
            ("model_index.json", exported_index(self.configs["model_index"])),
        ):
            (directory / name).write_text(json.dumps(config, indent=2) + "\n")
        if self.sampling is not None:
            write_sampling(directory, self.sampling)


def image_size(unet: UNetConfig, vae: VAEConfig) -> tuple[int, int]:
    """Return the (height, width) in pixels that networks of these configurations are trained for.

    Raises:
        UsageError: the UNet's states no size.
    """
    size = unet.sample_size
    if size is None:
        raise UsageError(
            "the checkpoint's unet/config.json gives no sample_size; set --rollout.height and "
            "--rollout.width"
        )
    height, width = (size, size) if isinstance(size, int) else size
    factor = vae.downscale_factor
    return factor * height, factor * width


def exported_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return `model_index.json` for the components we write: optional ones are declared absent."""
    written = dict(_components(index))
    kept: dict[str, Any] = {
        k: v if k in written or not isinstance(v, list) else [None, None] for k, v in index.items()
    }
    if index.get("_class_name") == "StableDiffusionPipeline":
        kept["requires_safety_checker"] = False
    return kept


def check_layout(directory: Path) -> dict[str, Any]:
    """Check that a directory is a Stable Diffusion pipeline before anything is read.

    Returns:
        Its `model_index.json`.

    Raises:
        UsageError: `model_index.json` is absent, or it names a pipeline or component that is not
            supported.
    """
    if not (directory / "model_index.json").is_file():
        raise UsageError(
            f"{directory} has no model_index.json, so it is not a pipeline in the Diffusers "
            "layout; give the directory that `pipe.save_pretrained` wrote (it holds unet/, vae/, "
            "text_encoder/, tokenizer/, scheduler/)"
        )
    index = read_json(directory / "model_index.json")
    for part, expected in _components(index).items():
        given = index.get(part)
        if not isinstance(given, list) or len(given) != 2 or given[1] is None:
            raise UsageError(
                f"{directory}/model_index.json names no {part!r}; expected "
                f"{' or '.join(expected) or 'one'}"
            )
        if expected and given[1] not in expected:
            raise UsageError(
                f"{directory}/model_index.json: {part} is a {given[1]}, which is not supported; "
                f"expected {' or '.join(expected)}"
            )
        if not (directory / part).is_dir():
            raise UsageError(
                f"{directory} has no {part}/ directory, though its model_index.json names one"
            )
    return index


def read_unet_config(fields: Mapping[str, Any], pipeline: str) -> UNetConfig:
    """Read a UNet's `config.json` as its pipeline's class does.

    The classes for Stable Diffusion 1 and 2 take a single `sample_size` below 64 for 64 in a file
    from before Diffusers 0.9.

    Args:
        fields: the JSON object.
        pipeline: the class that `model_index.json` names.

    Raises:
        UsageError: a field, or a field's value, is not supported.
    """
    config = UNetConfig.from_dict(fields)
    version = re.findall(r"\d+", str(fields.get("_diffusers_version", "")))[:2]
    is_old = bool(version) and tuple(map(int, version)) < (0, 9)
    is_small = isinstance(config.sample_size, int) and config.sample_size < 64
    if pipeline in PIPELINE_CORRECTIONS and is_old and is_small:
        return dataclasses.replace(config, sample_size=64)
    return config


def check_fit(
    directory: Path, unet: UNetConfig, vae: VAEConfig, encoders: list[dict[str, Any]]
) -> None:
    """Check that a UNet denoises the latents of a VAE's RGB images, by its text encoders alone.

    Args:
        directory: of the pipeline, for messages.
        unet: the UNet's configuration.
        vae: the VAE's.
        encoders: the text encoders' `config.json`, in order.

    Raises:
        UsageError: it does not.
    """
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise UsageError(
            f"{directory}: the UNet's in_channels is {unet.in_channels}, its out_channels "
            f"{unet.out_channels} and the VAE's latent_channels {vae.latent_channels}; expected "
            "the same number for all. A UNet with more in_channels is given a picture too, for "
            "inpainting (9), editing (8) or depth (5); give a text-to-image checkpoint"
        )
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise UsageError(
            f"{directory}: the VAE's in_channels is {vae.in_channels} and its out_channels "
            f"{vae.out_channels}; expected 3 and 3: rewards are given RGB images"
        )
    for field, unusual in (
        ("class_embed_type or num_class_embeds", unet.has_class_embedding),
        ("dual_cross_attention", unet.dual_cross_attention),
    ):
        if unusual:
            raise UsageError(
                f"{directory}: the UNet has {field}, so that it is conditioned on more than a "
                "text (a class, an image); expected a text-to-image checkpoint"
            )
    if len(encoders) == 1 and encoders[0].get("use_attention_mask"):
        raise UsageError(
            f"{directory}: text_encoder/config.json has use_attention_mask, by which Diffusers "
            "masks the padding of a prompt; here it is not masked: expected false, or no such field"
        )
    width = sum(int(fields.get("hidden_size", 512)) for fields in encoders)
    expected = set(unet.per_block("cross_attention_dim"))
    if expected != {width}:
        raise UsageError(
            f"{directory}: the UNet's cross_attention_dim is {unet.cross_attention_dim}, but its "
            f"{len(encoders)} text encoder(s) give {width} numbers a token; the components do not "
            "belong together"
        )
    if unet.addition_embed_type != "text_time":
        return
    if len(encoders) < 2:
        raise UsageError(
            f"{directory}: the UNet's addition_embed_type is 'text_time', which needs the "
            "projected output of a text_encoder_2, but model_index.json names none"
        )
    pooled = int(encoders[-1].get("projection_dim", 512))
    given = pooled + TIME_IDS * (unet.addition_time_embed_dim or 0)
    if given != unet.projection_class_embeddings_input_dim:
        raise UsageError(
            f"{directory}: the UNet's projection_class_embeddings_input_dim is "
            f"{unet.projection_class_embeddings_input_dim}, but the projection of text_encoder_2 "
            f"and {TIME_IDS} size ids give {given} numbers; the components do not belong together"
        )


def _variants(directory: Path, parts: Sequence[str], variant: str | None) -> dict[str, str | None]:
    """Return each component's variant: that asked for, or none where it has no files of it."""
    if variant is None:
        return dict.fromkeys(parts)
    found = {part: variant if has_variant(directory / part, variant) else None for part in parts}
    if plain := [part for part, chosen in found.items() if chosen is None]:
        warnings.warn(
            f"{directory}: no weights of the variant {variant!r} for {', '.join(plain)}, read "
            "without it",
            stacklevel=3,
        )
    return found


def _encoders(index: Mapping[str, Any]) -> dict[str, type[TextEncoder]]:
    """Return the classes of a pipeline's text encoders by the components' names."""
    second = index.get("text_encoder_2")
    if isinstance(second, list) and second[:1] != [None]:
        return {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return {"text_encoder": CLIPTextModel}


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a CLIPTokenizer with the files that Transformers 4 needs and 5 no longer writes."""
    tokenizer.save_pretrained(directory)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [f"{left} {right}" for left, right in model["merges"]]
    for name, text in (
        ("vocab.json", json.dumps(model["vocab"], ensure_ascii=False)),
        ("merges.txt", "\n".join(["#version: 0.2", *merges])),
    ):
        original = Path(tokenizer.name_or_path) / name
        data = original.read_bytes() if original.is_file() else f"{text}\n".encode()
        (directory / name).write_bytes(data)
    # Not copied: it goes before tokenizer_config.json, and a special token may have been changed.
    special = json.dumps(tokenizer.special_tokens_map, indent=2)
    (directory / "special_tokens_map.json").write_text(f"{special}\n", encoding="utf-8")


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the components that are read and written, with the classes they may be of."""
    parts: dict[str, tuple[str, ...]] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
    }
    for encoder, kind in _encoders(index).items():
        parts[encoder] = (kind.__name__,)
        parts[_tokenizer(encoder)] = ("CLIPTokenizer", "CLIPTokenizerFast")
    return parts | {"scheduler": ()}
