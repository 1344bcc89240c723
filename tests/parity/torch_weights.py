"""Copy the weights of a torch module into the NNX module with the same parameter names."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

# What NNX calls the leaves that torch calls "weight".
WEIGHT_LEAVES = ("kernel", "scale", "embedding")


def torch_name(path: tuple[Any, ...]) -> str:
    """Return the torch parameter name of an NNX leaf path (list indices are part of the path)."""
    *modules, leaf = (str(key) for key in path)
    return ".".join([*modules, "weight" if leaf in WEIGHT_LEAVES else leaf])


def to_nnx_layout(leaf: str, value: np.ndarray) -> np.ndarray:
    """Return a torch tensor in NNX's layout: Linear OI -> IO, Conv OIHW -> HWIO, others as is."""
    if leaf != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    assert value.ndim == 2, f"no rule for a kernel of {value.ndim} axes"
    return value.T


def copy_torch_weights(torch_module: Any, nnx_module: nnx.Module) -> None:
    """Copy every parameter of `torch_module` into `nnx_module`, in place and strictly both ways.

    Args:
        torch_module: any `torch.nn.Module`.
        nnx_module: a module, real or from `nnx.eval_shape`, whose leaves have the same names
            (`kernel`, `scale` and `embedding` stand for `weight`) and, after the change of layout,
            the same shapes.

    Raises:
        AssertionError: a parameter on either side has no partner, or the shapes differ.
    """
    tensors = {
        name: parameter.detach().float().numpy()
        for name, parameter in torch_module.named_parameters()
    }
    leaves = {
        torch_name(path): (path, leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(nnx_module, nnx.Param))
    }
    missing = sorted(tensors.keys() - leaves.keys())
    extra = sorted(leaves.keys() - tensors.keys())
    assert not missing and not extra, f"only in torch: {missing}\nonly in NNX: {extra}"
    filled = {}
    for name, (path, leaf) in leaves.items():
        value = to_nnx_layout(str(path[-1]), tensors[name])
        assert value.shape == leaf.shape, f"{name}: torch {value.shape}, NNX {leaf.shape}"
        # A copy, not a view: torch may change its memory in place before JAX has read it.
        filled[path] = leaf.replace(jnp.array(value, leaf.dtype))
    nnx.update(nnx_module, nnx.from_flat_state(filled))


def max_relative_error(actual: Any, expected: Any) -> float:
    """Return max |actual − expected| / max |expected|, in float64.

    Args:
        actual: an array of ours.
        expected: a torch tensor or an array of the same shape.
    """
    if hasattr(expected, "detach"):
        expected = expected.detach().float().numpy()
    expected = np.asarray(expected, np.float64)
    actual = np.asarray(jnp.asarray(actual, jnp.float32), np.float64)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
