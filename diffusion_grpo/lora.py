"""Low-rank adapters on linear layers: W x + (α/r) B A x (Hu et al. 2021, eq. 3).

An adapted layer keeps its class's parameters at their paths and gains two of type `LoRAParam`, so
that the checkpoint table reads it as before and a filter on the type splits the adapter from the
rest. With B = 0 the layer is exactly the original one: the reference model costs no second UNet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError


class LoRAParam(nnx.Param):
    """A parameter of an adapter."""


class LoRALinear(nnx.Linear):
    """A linear layer with a low-rank adapter."""

    def __init__(self, linear: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        """Adapt a layer.

        Args:
            linear: the layer; its parameters are shared, not copied.
            rank: r.
            alpha: α; the adapter's output is scaled by α/r.
            rngs: draws A ~ N(0, 1/r); B starts at 0, so that nothing changes at first.
        """
        nnx.Module.__init__(self)
        for name, value in vars(linear).items():
            if not name.startswith("_pytree"):
                setattr(self, name, value)
        self.scale = alpha / rank
        # Float32 whatever the layer's: small updates would be lost in bfloat16.
        a = jax.random.normal(rngs.params(), (linear.in_features, rank), jnp.float32) / rank
        self.lora_a = LoRAParam(a)
        self.lora_b = LoRAParam(jnp.zeros((rank, linear.out_features), jnp.float32))

    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:  # type: ignore[override]
        """Map [..., in] to [..., out]."""
        out = super().__call__(inputs)
        low = inputs.astype(out.dtype) @ self.lora_a[...].astype(out.dtype)
        return out + (low @ self.lora_b[...].astype(out.dtype)) * self.scale


def attach_lora(
    module: nnx.Module, targets: Sequence[str], *, rank: int, alpha: float, rngs: nnx.Rngs
) -> list[str]:
    r"""Give an adapter to every linear layer whose path ends in a match of one of the patterns.

    Args:
        module: changed in place.
        targets: regular expressions on dotted paths, such as `to_q` or `to_out\.0`.
        rank: r of every adapter.
        alpha: α of every adapter.
        rngs: source of the initial A.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        UsageError: a pattern matches no linear layer.
    """
    patterns = {target: re.compile(rf"(^|\.)(?:{target})$") for target in targets}
    found: dict[str, int] = dict.fromkeys(targets, 0)
    adapted: list[str] = []
    for parent_path, parent in list(nnx.iter_graph(module)):
        if not isinstance(parent, nnx.Module):
            continue
        for key, child in _children(parent):
            path = ".".join(map(str, (*parent_path, key)))
            matching = [target for target, pattern in patterns.items() if pattern.search(path)]
            if type(child) is not nnx.Linear or not matching:
                continue
            for target in matching:
                found[target] += 1
            layer = LoRALinear(child, rank=rank, alpha=alpha, rngs=rngs)
            if isinstance(key, int):
                parent[key] = layer  # type: ignore[index]
            else:
                setattr(parent, key, layer)
            adapted.append(path)
    for target, count in found.items():
        if not count:
            raise UsageError(
                f"lora_targets: {target!r} matches no linear layer of {type(module).__name__}; its "
                "linear layers end in to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, …"
            )
    return adapted


def _children(parent: Any) -> list[tuple[str | int, Any]]:
    if isinstance(parent, nnx.List):
        return list(enumerate(parent))
    return [(name, child) for name, child in vars(parent).items() if isinstance(child, nnx.Module)]


def merge_lora(module: nnx.Module) -> None:
    """Add every adapter into its kernel, W + (α/r) A B in float32, and remove it; in place."""
    for _, parent in list(nnx.iter_graph(module)):
        if not isinstance(parent, nnx.Module):
            continue
        for key, child in _children(parent):
            if not isinstance(child, LoRALinear):
                continue
            plain = nnx.eval_shape(
                lambda child=child: nnx.Linear(
                    child.in_features,
                    child.out_features,
                    use_bias=child.use_bias,
                    dtype=child.dtype,
                    param_dtype=child.param_dtype,
                    rngs=nnx.Rngs(0),
                )
            )
            kernel = child.kernel[...]
            delta = child.scale * (child.lora_a[...] @ child.lora_b[...])
            plain.kernel = nnx.Param((kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
            if child.bias is not None:
                plain.bias = child.bias
            if isinstance(key, int):
                parent[key] = plain  # type: ignore[index]
            else:
                setattr(parent, key, plain)
