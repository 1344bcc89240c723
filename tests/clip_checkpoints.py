"""Genuine CLIP checkpoints, random, with a tokenizer of single letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

EOS, VOCAB, TOKENS = 98, 99, 24


def text_config(**changes: Any) -> transformers.CLIPTextConfig:
    values: dict[str, Any] = dict(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=TOKENS,
        bos_token_id=97,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return transformers.CLIPTextConfig(**(values | changes))


def vision_config(**changes: Any) -> transformers.CLIPVisionConfig:
    values: dict[str, Any] = dict(
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    )
    return transformers.CLIPVisionConfig(**(values | changes))


def clip_config(layers: int = 2) -> transformers.CLIPConfig:
    return transformers.CLIPConfig(
        text_config=text_config(num_hidden_layers=layers).to_dict(),
        vision_config=vision_config(num_hidden_layers=layers).to_dict(),
        projection_dim=20,
    )


def randomized(module: Any, seed: int = 0) -> Any:
    """Give every parameter, biases and norms too, values that matter in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                parameter.fill_(2.0)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                fan_in = parameter[0].numel() if "embedding" not in name else 4
                parameter.copy_(noise * fan_in**-0.5)
    return module.eval()


def write_letters(folder: Path, size: int = 32) -> Path:
    """Write a tokenizer of single letters and an image processor for square images."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: i for i, token in enumerate(tokens)}
    vocab |= {"<|startoftext|>": 97, "<|endoftext|>": EOS}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Write a whole checkpoint as Transformers does."""
    write_letters(folder)
    randomized(transformers.CLIPModel(clip_config()), seed).save_pretrained(folder)
    return folder
