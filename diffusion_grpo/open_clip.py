"""Names and layouts of OpenCLIP's checkpoints, as the Transformers checkpoints have them.

For weights that are published by OpenCLIP's names alone. Its attention keeps the projections of
query, key and value in one matrix; its two output projections are stored as [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from diffusion_grpo.errors import UsageError

_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_FUSED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_BUFFERS = ("attn_mask",)


def is_open_clip(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors have OpenCLIP's names."""
    return any(name.startswith("visual.") for name in tensors)


def from_open_clip(tensors: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """Rename an OpenCLIP model's tensors, and lay them out, as Transformers' `CLIPModel` has them.

    Args:
        tensors: the state dictionary of an OpenCLIP model with a vision transformer.
        source: where they come from, for messages.

    Returns:
        Tensors by their names in Transformers.

    Raises:
        UsageError: a tensor that such a model does not have; it is named.
    """
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if name in _NAMES:
            renamed[_NAMES[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T
        elif fused := _FUSED.fullmatch(name):
            tower, number, kind = fused.groups()
            parts = np.split(tensor, 3)
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                renamed[f"{_layer(tower, number)}.self_attn.{projection}.{kind}"] = part
        elif (match := _LAYER.fullmatch(name)) and match[3] in _IN_LAYER:
            renamed[f"{_layer(match[1], match[2])}.{_IN_LAYER[match[3]]}.{match[4]}"] = tensor
        elif name not in _BUFFERS:
            raise UsageError(
                f"{source}: unexpected tensor {name!r}; expected those of an OpenCLIP model with "
                "a vision transformer"
            )
    return renamed


def _layer(tower: str | None, number: str) -> str:
    return f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
