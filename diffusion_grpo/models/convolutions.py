"""Convolutions in formulations that suit the CPU; other devices are given JAX's own.

XLA's CPU backend brings the pixels under a kernel together in memory before it multiplies, which
costs by kernel size times input channels, however few the outputs are. The numbers are those of the
plain convolution up to rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.models.kernels import backend


def rows_dot(x: Float[Array, "*rows i"], kernel: Float[Array, "i o"], **kw: Any) -> Array:
    """Return x @ kernel with all leading axes of `x` as one.

    XLA's CPU backend takes the kernel's gradient 2 to 5 times faster so.
    """
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kw)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def pointwise(
    x: Array, kernel: Array, strides: Any, padding: Any, *, precision: Any, **kw: Any
) -> Array:
    """Convolve with a kernel of 1×1; in place of `lax.conv_general_dilated`."""
    return rows_dot(x, kernel[0, 0], precision=precision)


def to_few(x: Array, kernel: Array, strides: Any, padding: Any, **kw: Any) -> Array:
    """Convolve to few channels with stride 1; in place of `lax.conv_general_dilated`.

    On the CPU every pixel is multiplied with the whole kernel once, and the products are moved and
    summed: Σ_ab shift_ab(x K_ab). XLA merges that sum with what follows, each program in its way,
    so that two programs may differ in the last bit: not for a network whose densities are compared.

    Args:
        x: `[B, h, w, i]`.
        kernel: `[kh, kw, i, o]`.
        strides: 1 both.
        padding: ((top, bottom), (left, right)), zeros.
        **kw: `precision`, and what else `nnx.Conv` passes.
    """
    rows, columns, inputs, outputs = kernel.shape
    if backend() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kw)
    flat = kernel.transpose(2, 0, 1, 3).reshape(inputs, rows * columns * outputs)
    # What is summed is not rounded to half precision before.
    sums = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    products = rows_dot(x, flat, precision=kw["precision"], preferred_element_type=sums)
    products = jnp.pad(products, ((0, 0), *padding, (0, 0)))
    height, width = products.shape[1] - rows + 1, products.shape[2] - columns + 1
    parts = jnp.split(products, rows * columns, axis=-1)
    moved = [
        parts[a * columns + b][:, a : a + height, b : b + width]
        for a in range(rows)
        for b in range(columns)
    ]
    return sum(moved[1:], start=moved[0]).astype(x.dtype)


def doubled(x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
    """Return the picture at twice its size (nearest neighbor)."""
    b, h, w, c = x.shape
    repeated = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return repeated.reshape(b, 2 * h, 2 * w, c)


def of_doubled(x: Float[Array, "B h w i"], conv: nnx.Conv) -> Float[Array, "B h2 w2 o"]:
    """Return `conv` (3×3, padded by 1) of the picture at twice its size (nearest neighbor).

    Each pixel of the doubled picture has three rows of neighbors that stem from two rows of the
    small one, and columns likewise. So on the CPU the doubled picture is never made: its pixels of
    even and odd rows and columns are four convolutions of the small picture, whose 2×2 kernels are
    sums over the 3×3 one's entries. That takes 4/9 of the multiplications. For the autoencoder:
    where a network is trained over several devices, they would sum up the gradients of the four
    kernels, 16/9 of the bytes.

    Args:
        x: the small picture.
        conv: 3×3, padded by 1, without adapters.
    """
    b, h, w, _ = x.shape
    if backend() != "cpu":
        return conv(doubled(x))
    parts = _merged(_merged(conv.kernel[...], 0), 2)  # [2, 2 rows, 2, 2 columns, i, o]
    parts = parts.astype(conv.dtype)
    rows = []
    for a in range(2):
        columns = [
            jax.lax.conv_general_dilated(
                x.astype(conv.dtype),
                parts[a, :, d],
                (1, 1),
                ((1 - a, a), (1 - d, d)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=conv.precision,
            )
            for d in range(2)
        ]
        rows.append(jnp.stack(columns, axis=3))
    out = jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, parts.shape[-1])
    return out if conv.bias is None else out + conv.bias[...].astype(out.dtype)[None, None, None]


def _merged(kernel: Array, axis: int) -> Array:
    """Turn an axis of 3 into [parity of the pixel, 2]: (k₀, k₁+k₂) of even, (k₀+k₁, k₂) of odd."""
    k0, k1, k2 = jnp.split(kernel, 3, axis=axis)
    even, odd = (jnp.concatenate(pair, axis=axis) for pair in ((k0, k1 + k2), (k0 + k1, k2)))
    return jnp.stack([even, odd], axis=axis)
