"""The published configurations of the Stable Diffusion families, and scaled-down relatives.

The numbers are facts from the model repositories' config files. A relative keeps every structural
feature (block types, heads, depths that differ by block, projections, conditioning, activations)
and shrinks widths, layers and resolutions only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Fields = dict[str, Any]

_CROSS = "CrossAttn"

SD_VAE: Fields = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD_BETAS: Fields = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "clip_sample": False,
    "steps_offset": 1,
}
CLIP_L: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,  # what the files say; the end of the text is the largest id
    "pad_token_id": 1,
}
OPEN_CLIP_H: Fields = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPEN_CLIP_BIG_G: Fields = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD15_UNET: Fields = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (f"{_CROSS}DownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + (f"{_CROSS}UpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
SD21_UNET: Fields = SD15_UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET: Fields = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D",) + (f"{_CROSS}DownBlock2D",) * 2,
    "up_block_types": (f"{_CROSS}UpBlock2D",) * 2 + ("UpBlock2D",),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "norm_num_groups": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """The configurations of one pipeline's components, as the Diffusers classes take them."""

    unet: Fields
    vae: Fields
    text_encoder: Fields
    scheduler_class: str
    scheduler: Fields
    text_encoder_2: Fields | None = None


PUBLISHED = {
    "sd15": Family(SD15_UNET, SD_VAE, CLIP_L, "PNDMScheduler", SD_BETAS | {"skip_prk_steps": True}),
    "sd21": Family(
        SD21_UNET,
        SD_VAE | {"sample_size": 768},
        OPEN_CLIP_H,
        "DDIMScheduler",
        SD_BETAS | {"prediction_type": "v_prediction"},
    ),
    "sdxl": Family(
        SDXL_UNET,
        SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        CLIP_L,
        "EulerDiscreteScheduler",
        SD_BETAS | {"prediction_type": "epsilon", "timestep_spacing": "leading"},
        OPEN_CLIP_BIG_G,
    ),
}
# The zero-terminal-SNR fine-tunes of SD 2.1 (Lin et al. 2023).
ZERO_SNR: Fields = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

WIDTHS = {"text_encoder": 24, "text_encoder_2": 40}  # of the relatives' text encoders
TOKENS = 16
LATENT = 8


def small(family: Family, vocabulary: int) -> Family:
    """Return the scaled-down relative of a family; `vocabulary` is its tokenizer's size.

    A UNet of width 20 has the heads of the full one, two channels each at the top. The end-of-text
    id stays the files' historical 2, which stands for the largest id.
    """
    width = WIDTHS["text_encoder"]
    unet = family.unet | {
        "sample_size": LATENT,
        "block_out_channels": tuple(c // 16 for c in family.unet["block_out_channels"]),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": width,
    }
    if family.unet["attention_head_dim"] == 8:
        unet["attention_head_dim"] = 4
    second = None
    if family.text_encoder_2 is not None:
        other = WIDTHS["text_encoder_2"]
        unet |= {
            "cross_attention_dim": width + other,
            "transformer_layers_per_block": (1, 1, 2),  # of the first no block has any
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": other + 6 * 8,
        }
        second = _small_text(family.text_encoder_2, other, 5, vocabulary)
    vae = family.vae | {
        "block_out_channels": (8, 8, 16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 8 * LATENT,
    }
    return dataclasses.replace(
        family,
        unet=unet,
        vae=vae,
        text_encoder=_small_text(family.text_encoder, width, 3, vocabulary),
        text_encoder_2=second,
    )


def _small_text(fields: Fields, width: int, heads: int, vocabulary: int) -> Fields:
    return fields | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "max_position_embeddings": TOKENS,
        "vocab_size": vocabulary,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
    }
