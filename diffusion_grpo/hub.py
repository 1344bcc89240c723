"""Which files of a hub repository are downloaded."""

from __future__ import annotations

from typing import Literal

from diffusion_grpo.sampling import FILE as SAMPLING_FILE

Layout = Literal["diffusers", "transformers", "processor"]


def hub_patterns(layout: Layout, variant: str | None = None) -> list[str]:
    """Return what is downloaded of a hub repository, as `fnmatch` patterns (`*` crosses a `/`).

    `diffusers` is a pipeline with a folder for each component, `transformers` one model,
    `processor` what goes with a model without its weights.

    Weights are named in full, so that other variants (`.fp16.`, `.non_ema.`), components that are
    not used and single-file checkpoints stay behind. Of a `variant`, only its files are taken.
    """
    infix = f".{variant}" if variant else ""

    def weights(stem: str) -> list[str]:
        return [
            f"{stem}{infix}.safetensors",
            f"{stem}{infix}-?????-of-?????.safetensors",
            f"{stem}{infix}.safetensors.index.json",
            *([f"{stem}.safetensors.index.{variant}.json"] if variant else ()),
        ]

    configs = ["config.json", "preprocessor_config.json"]
    tokenizer = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ]
    if layout == "processor":
        return [*configs, *tokenizer]
    if layout == "transformers":
        return [*configs, *tokenizer, *weights("model")]
    return [
        "model_index.json",
        SAMPLING_FILE,
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
        "scheduler/scheduler_config.json",
        *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in tokenizer),
        *weights("unet/diffusion_pytorch_model"),
        *weights("vae/diffusion_pytorch_model"),
        *weights("text_encoder/model"),
        *weights("text_encoder_2/model"),
    ]
