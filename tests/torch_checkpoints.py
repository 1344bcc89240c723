"""Genuine, tiny Diffusers and Transformers checkpoints, random, written by the torch classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from families import PUBLISHED, small
from families import TOKENS as FAMILY_TOKENS
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffusion_grpo.shapes.tokenizer import write_tokenizer

TOKENS = 16
WIDTH = 24
# The fields of a UNet with each kind of block once: compiled in half the time of three levels.
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def make_unet(**fields: Any) -> UNet2DConditionModel:
    """A torch UNet of three levels, cross-attention on two; `fields` override its configuration."""
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**config | fields).eval()


def make_vae(**fields: Any) -> AutoencoderKL:
    """A torch VAE that halves twice; `fields` override its configuration."""
    config = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(**config | fields).eval()


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give norms and biases values of their own.

    At initialization they are ones and zeros, which hide errors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def write_pipeline(directory: Path, *, prediction_type: str = "epsilon", **unet: Any) -> Path:
    """Write a Stable Diffusion pipeline directory with Diffusers itself."""
    torch.manual_seed(0)
    tokenizer_files = directory.parent / f"{directory.name}-tokenizer"
    vocabulary = write_tokenizer(tokenizer_files, TOKENS)
    text_config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    StableDiffusionPipeline(
        unet=randomize(make_unet(**unet)),
        vae=randomize(make_vae()),
        text_encoder=randomize(CLIPTextModel(text_config)),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_files),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory, safe_serialization=True)
    return directory


def write_family(directory: Path, name: str, **scheduler: Any) -> Path:
    """Write the scaled-down relative of a published family with Diffusers itself.

    Args:
        directory: where.
        name: of the family in `families.PUBLISHED`.
        **scheduler: override its scheduler's configuration.
    """
    torch.manual_seed(0)
    tokenizer_files = directory.parent / f"{directory.name}-tokenizer"
    vocabulary = write_tokenizer(tokenizer_files, FAMILY_TOKENS)
    family = small(PUBLISHED[name], vocabulary)
    kind: Any = getattr(diffusers, family.scheduler_class)
    # OpenCLIP's tokenizers pad with "!", CLIP-L's with the end-of-text token.
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_files)
    other = CLIPTokenizer.from_pretrained(tokenizer_files, pad_token="!")
    parts: dict[str, Any] = {
        "unet": randomize(UNet2DConditionModel(**family.unet).eval()),
        "vae": randomize(AutoencoderKL(**family.vae).eval()),
        "text_encoder": spread(CLIPTextModel(CLIPTextConfig(**family.text_encoder))),
        "tokenizer": other if name == "sd21" else tokenizer,
        "scheduler": kind.from_config(family.scheduler | scheduler),
    }
    if family.text_encoder_2 is None:
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        config = CLIPTextConfig(**family.text_encoder_2)
        parts["text_encoder_2"] = spread(CLIPTextModelWithProjection(config))
        parts["tokenizer_2"] = other
        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    pipe.save_pretrained(directory, safe_serialization=True)
    return directory


def spread(encoder: torch.nn.Module) -> torch.nn.Module:
    """Randomize a text encoder so that prompts differ: its initial embeddings are close to 0."""
    randomize(encoder)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.mul_(25)
    return encoder.eval()
