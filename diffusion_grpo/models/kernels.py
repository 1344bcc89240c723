"""Which device is traced for, the attention that it is given, and the one of ours."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError

Implementation = Literal["xla", "cudnn", "flash", "heads_first"]

VARIABLE = "DIFFUSION_GRPO_ATTENTION"  # of the environment: overrides the choice
_CHOICES: tuple[Implementation, ...] = ("xla", "cudnn", "flash", "heads_first")
_BLOCKS = (512, 256, 128)  # queries, or keys, that the TPU kernel holds at a time

# One of JAX's own contexts: a program that was traced in it is not taken for one that runs.
_PLANNED = jax.make_user_context(None)
_ONE_SHARD = jax.make_user_context(False)


@contextlib.contextmanager
def planned_for(backend: str) -> Iterator[None]:
    """Have what is traced inside use the implementations of a backend that is not here.

    It can be traced, and its cost found, but not run there: what a fused kernel would do is stood
    in for by a program named `fused_attention`. Of several devices it is one's share of the work.

    Args:
        backend: JAX's name of it.
    """
    with _PLANNED(backend):
        yield


def of_one_shard() -> AbstractContextManager[Any]:
    """Have what is traced inside take its rows for those of one device of the mesh.

    It is what `jax.vmap` maps over shards, with the mesh's axes as its `spmd_axis_name`.
    """
    return _ONE_SHARD(True)


def backend() -> str:
    """Return JAX's name of the device that is traced for: cpu, gpu, tpu."""
    return _PLANNED.value or jax.default_backend()


def devices() -> int:
    """Return over how many devices a batch that is traced is divided."""
    if _ONE_SHARD.value or _PLANNED.value:
        return 1
    return max(jax.sharding.get_abstract_mesh().size, 1)  # 0 of none


def attention_implementation(
    backend: str, dtype: Any, *, queries: int, keys: int, head_dim: int, divides: bool = True
) -> Implementation:
    """Choose an implementation of attention; the numbers they compute are the same.

    `cudnn` is a fused kernel, which never writes the scores to memory. It takes half precision
    alone, and heads whose width is a multiple of 8, at most 128 on every card (256 on some). It
    pays where there are many scores: among the 4096 and 1024 pixels of Stable Diffusion's upper
    levels. `flash` is JAX's Pallas kernel of the same kind for TPUs, which takes whole blocks of
    tokens; XLA cannot divide it over devices, so that each has to have as many rows.
    `heads_first` brings heads before tokens by itself, where XLA's CPU backend would run the
    batched products on strided memory, at up to twice the time; below 64 queries the transposes
    cost more than that. `xla` is JAX's plain one, for all else.

    Args:
        backend: JAX's: cpu, gpu, tpu.
        dtype: of queries, keys and values.
        queries: their number.
        keys: theirs.
        head_dim: width of a head.
        divides: whether the devices have equally many rows.

    Raises:
        UsageError: the environment's `DIFFUSION_GRPO_ATTENTION` names none of the four.
    """
    given = os.environ.get(VARIABLE)
    if given:
        for name in _CHOICES:
            if given == name:
                return name
        raise UsageError(f"{VARIABLE} is {given!r}; expected one of {', '.join(_CHOICES)}")
    if backend == "cpu":
        return "heads_first" if queries >= 64 else "xla"
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = head_dim % 8 == 0 and head_dim <= 128
    if backend in ("gpu", "cuda") and half and fits and min(queries, keys) >= 256:
        return "cudnn"
    whole = queries % _BLOCKS[-1] == keys % _BLOCKS[-1] == 0
    pays = whole and head_dim <= 256 and min(queries, keys) >= 512
    if backend == "tpu" and half and divides and pays:
        return "flash"
    return "xla"


def attend(
    query: Float[Array, "B n heads d"],
    key: Float[Array, "B m heads d"],
    value: Float[Array, "B m heads d"],
) -> Float[Array, "B n heads d"]:
    """Return softmax(q kᵀ / √d) v, scores and softmax in float32, in the dtype of the values."""
    implementation = attention_implementation(
        backend(),
        query.dtype,
        queries=query.shape[1],
        keys=key.shape[1],
        head_dim=query.shape[-1],
        divides=query.shape[0] % devices() == 0,
    )
    if implementation == "heads_first":
        return _heads_first(query, key, value)
    if implementation in ("cudnn", "flash") and _PLANNED.value:
        return _stand_in(query, key, value)
    if implementation == "flash":
        return _divided(_flash, query, key, value)
    # Inside, JAX promotes bfloat16 to float32 implicitly, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


def _heads_first(query: Array, key: Array, value: Array) -> Array:
    q, k, v = (part.swapaxes(1, 2) for part in (query, key, value))
    # The queries are fewer than the scores, which XLA would scale by an array as large as they.
    q = q * jnp.asarray(1 / math.sqrt(query.shape[-1]), q.dtype)
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v)
    return out.swapaxes(1, 2)


def _divided(
    kernel: Callable[[Array, Array, Array], Array], query: Array, key: Array, value: Array
) -> Array:
    """Run a kernel on each device's own rows, which XLA would bring together for it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return kernel(query, key, value)
    if query.shape[0] % devices():
        raise UsageError(
            f"{VARIABLE} is 'flash', which {mesh.size} devices cannot divide {query.shape[0]} rows "
            "for; expected it to be unset"
        )
    # Within `of_one_shard`, vmap adds the mesh's axes.
    rows = PartitionSpec() if _ONE_SHARD.value else PartitionSpec(mesh.axis_names)
    divided = jax.shard_map(kernel, in_specs=(rows,) * 3, out_specs=rows, check_vma=False)
    return divided(query, key, value)


def _flash(query: Array, key: Array, value: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    def block(tokens: int) -> int:
        fitting = [size for size in _BLOCKS if tokens % size == 0]
        if not fitting:
            raise UsageError(
                f"{VARIABLE} is 'flash', which takes multiples of {_BLOCKS[-1]} tokens, not "
                f"{tokens}; expected it to be unset"
            )
        return fitting[0]

    q, k, v = (part.swapaxes(1, 2) for part in (query, key, value))
    of_queries, of_keys = block(q.shape[2]), block(k.shape[2])
    sizes = tpu.BlockSizes(
        block_q=of_queries,
        block_k_major=of_keys,
        block_k=of_keys,
        block_b=1,
        block_q_major_dkv=of_queries,
        block_k_major_dkv=of_keys,
        block_k_dkv=of_keys,
        block_q_dkv=of_queries,
        block_k_major_dq=of_keys,
        block_k_dq=of_keys,
        block_q_dq=of_queries,
    )
    with jax.numpy_dtype_promotion("standard"):
        out = tpu.flash_attention(
            q, k, v, sm_scale=1 / math.sqrt(query.shape[-1]), block_sizes=sizes
        )
    return out.swapaxes(1, 2)


def fused_attention(query: Array, key: Array, value: Array) -> Array:
    """What a fused kernel computes, for `planned_for`."""
    return _heads_first(query, key, value)


def fused_attention_backward(parts: Any, gradient: Array) -> Any:
    """Its gradient, from queries, keys, values and the output."""
    query, key, value, _ = parts
    return jax.vjp(_heads_first, query, key, value)[1](gradient)


@jax.custom_vjp
def _stand_in(query: Array, key: Array, value: Array) -> Array:
    return jax.jit(fused_attention)(query, key, value)


def _stand_in_forward(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
    out = _stand_in(query, key, value)
    return out, (query, key, value, out)


_stand_in.defvjp(_stand_in_forward, jax.jit(fused_attention_backward))
