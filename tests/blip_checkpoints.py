"""Genuine ImageReward weights, random: torch's BLIP and head by the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from clip_checkpoints import randomized
from transformers.models.blip.modeling_blip_text import BlipTextModel


def mlp_head(width: int) -> torch.nn.Module:
    head = torch.nn.Module()
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    head.layers = torch.nn.Sequential(
        linear(width, 1024),
        dropout(0.2),
        linear(1024, 128),
        dropout(0.2),
        linear(128, 64),
        dropout(0.1),
        linear(64, 16),
        linear(16, 1),
    )
    return head.eval()


def write_image_reward(folder: Path) -> tuple[Any, Any, Any]:
    """Write random weights by the published names; returns torch's models with the same."""
    vision = transformers.BlipVisionModel(
        transformers.BlipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        transformers.BlipTextConfig(
            vocab_size=40,
            hidden_size=32,
            encoder_hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=36,
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    head = mlp_head(32)
    for module in (vision, text, head):
        randomized(module)
    published = {}
    for name, tensor in vision.state_dict().items():
        for theirs, ours in (
            ("embeddings.class_embedding", "cls_token"),
            ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("encoder.layers", "blocks"),
            ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn", "attn"),
            ("post_norm", "norm"),
            ("post_layernorm", "norm"),
        ):
            name = name.replace(theirs, ours)
        published[f"blip.visual_encoder.{name}"] = tensor
    published |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    published["blip.text_encoder.embeddings.position_ids"] = torch.arange(36)[None]
    published |= {f"blip.vision_proj.{k}": torch.zeros(2) for k in ("weight", "bias")}
    published |= {f"mlp.{k}": v for k, v in head.state_dict().items()}
    torch.save(published, folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words + ["cat", "dog", "zebra"]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return vision.eval(), text.eval(), head
