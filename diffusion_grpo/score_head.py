"""Heads that turn an embedding into one number: linear layers, one after the other.

The published heads (LAION's two aesthetic predictors, ImageReward) have no activation between their
layers, and dropout only while they are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError

# A layer's weight [out, in] and bias [out].
Head = Sequence[tuple[np.ndarray, np.ndarray]]

# The layers by their names: of a single `torch.nn.Linear`, and of the `torch.nn.Sequential` with
# dropout in between that the MLP heads are.
_LINEAR = ("",)
_MLP = tuple(f"layers.{number}." for number in (0, 2, 4, 6, 7))


def score_head(tensors: Mapping[str, np.ndarray], *, source: str) -> Head:
    """Return the layers of a published head, in order.

    Args:
        tensors: `weight` and `bias`; or those of `layers.0`, `.2`, `.4`, `.6` and `.7`.
        source: where they come from, for messages.

    Returns:
        float32 layers; the first takes the embedding, the last returns one number.

    Raises:
        UsageError: other tensors, or shapes that do not follow on each other.
    """
    layers = _LINEAR if "weight" in tensors else _MLP
    expected = {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}
    if set(tensors) != expected:
        raise UsageError(
            f"{source} holds the tensors {', '.join(sorted(tensors)[:12])}; expected a linear head "
            f"(weight, bias) or an MLP head ({', '.join(f'{layer}*' for layer in _MLP)})"
        )
    head = [
        tuple(np.asarray(tensors[f"{layer}{kind}"], np.float32) for kind in ("weight", "bias"))
        for layer in layers
    ]
    width = head[0][0].shape[-1]
    for layer, (weight, bias) in zip(layers, head, strict=True):
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise UsageError(
                f"{source}: {layer}weight has shape {weight.shape} and {layer}bias {bias.shape}; "
                f"expected (n, {width}) and (n,)"
            )
        width = weight.shape[0]
    if width != 1:
        raise UsageError(f"{source}: the last layer returns {width} numbers; expected 1")
    return [(weight, bias) for weight, bias in head]


def apply_head(head: Head, embeddings: Any) -> Any:
    """Return W_n (… (W_1 e + b_1) …) + b_n of each embedding.

    Args:
        head: of `score_head`.
        embeddings: JAX float32 [B, d].

    Returns:
        JAX float32 [B].
    """
    import jax.numpy as jnp

    for weight, bias in head:
        embeddings = jnp.matmul(embeddings, weight.T, precision="highest") + bias[None]
    return embeddings[:, 0]
