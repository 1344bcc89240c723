"""Convolutions and residual blocks shared by the UNet and the autoencoders, in NHWC layout.

Attribute names are those of Diffusers, so that a checkpoint's parameter names are module paths.
Nothing here knows of diffusion steps, rewards or GRPO. PyTorch's Diffusers is the reference for the
numerics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models import convolutions
from diffusion_grpo.models.norms import group_norm

DType = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
}


def activation(name: str, field: str) -> Callable[[Array], Array]:
    """Return the activation function a checkpoint's config names.

    Args:
        name: one of `ACTIVATIONS`.
        field: the config field it stands in, for the error message.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise UsageError(
            f"{field}={name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def checkpointed(module: nnx.Module, enabled: bool, *args: Any) -> Any:
    """Call `module(*args)`, recomputing its activations in the backward pass when `enabled`."""
    forward = type(module).__call__
    return (jax.checkpoint(forward) if enabled else forward)(module, *args)


def _linear_dot_general(x: Array, kernel: Array, dimension_numbers: Any, **kw: Any) -> Array:
    return convolutions.rows_dot(x, kernel, **kw)


def linear(in_features: int, out_features: int, **kw: Any) -> nnx.Linear:
    """Build a linear layer over the last axis; see `convolutions.rows_dot`."""
    return nnx.Linear(in_features, out_features, dot_general=_linear_dot_general, **kw)


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    use_bias: bool = True,
    few_outputs: bool = False,
    dtype: DType,
    param_dtype: DType,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a square convolution, padded on both sides by `(kernel - 1) // 2` unless told.

    `few_outputs`, with stride 1, has it computed by `convolutions.to_few`.
    """
    pad = (kernel - 1) // 2 if padding is None else padding
    formulation = jax.lax.conv_general_dilated
    if (kernel, stride, pad) == (1, 1, 0):
        formulation = convolutions.pointwise
    elif few_outputs:
        formulation = convolutions.to_few
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        conv_general_dilated=formulation,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Identity(nnx.Module):
    """Stand where the checkpoint's numbering has a module without parameters (dropout)."""

    def __call__(self, x: Array) -> Array:
        """Return the input."""
        return x


class ResnetBlock2D(nnx.Module):
    """Residual block: conv2(act(norm2(conv1(act(norm1(x))) + time))) + shortcut(x).

    With `time_scale_shift="scale_shift"` the time embedding gives (scale, shift) applied after
    norm2 instead. The sum is divided by `output_scale`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        groups: int,
        eps: float,
        act_fn: str = "silu",
        time_scale_shift: str = "default",
        output_scale: float = 1.0,
        **kw: Any,
    ):
        """Build the block; `temb_channels=None` leaves the time embedding out (VAE)."""
        self.norm1 = group_norm(groups, in_channels, eps, **kw)
        self.conv1 = conv(in_channels, out_channels, 3, **kw)
        self.scale_shift = time_scale_shift == "scale_shift"
        if temb_channels is not None:
            width = 2 * out_channels if self.scale_shift else out_channels
            self.time_emb_proj = linear(temb_channels, width, **kw)
        self.norm2 = group_norm(groups, out_channels, eps, **kw)
        self.conv2 = conv(out_channels, out_channels, 3, **kw)
        if in_channels != out_channels:
            self.conv_shortcut = conv(in_channels, out_channels, 1, **kw)
        self.has_time = temb_channels is not None
        self.has_shortcut = in_channels != out_channels
        self.act = activation(act_fn, "act_fn")
        self.output_scale = float(output_scale)

    def __call__(
        self, x: Float[Array, "B h w i"], temb: Float[Array, "B e"] | None = None
    ) -> Float[Array, "B h w o"]:
        """Map [B, h, w, in_channels] to [B, h, w, out_channels]."""
        h = self.conv1(self.act(self.norm1(x)))
        if self.has_time:
            assert temb is not None
            time = self.time_emb_proj(self.act(temb))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + time)
        else:
            h = self.norm2(h)
        h = self.conv2(self.act(h))
        x = (self.conv_shortcut(x) if self.has_shortcut else x) + h
        return x if self.output_scale == 1 else x / self.output_scale


class Downsample2D(nnx.Module):
    """Strided 3×3 convolution; `padding=0` pads right and bottom by one (VAE's encoder)."""

    def __init__(self, channels: int, *, padding: int = 1, **kw: Any):
        """Build it for `channels` in and out."""
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, **kw)
        self.asymmetric = padding == 0

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        """Halve the spatial size."""
        if self.asymmetric:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbor upsampling, then a 3×3 convolution."""

    def __init__(self, channels: int, *, differentiated: bool = True, **kw: Any):
        """Build it for `channels` in and out.

        One whose gradient is never taken may be computed by `convolutions.of_doubled`.
        """
        self.conv = conv(channels, channels, 3, **kw)
        self.differentiated = differentiated

    def __call__(
        self, x: Float[Array, "B h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B h2 w2 c"]:
        """Double the spatial size, or bring it to `size` (odd sizes met on the way down)."""
        _, h, w, _ = x.shape
        if size is None or size == (2 * h, 2 * w):
            if self.differentiated:
                return self.conv(convolutions.doubled(x))
            return convolutions.of_doubled(x, self.conv)
        rows = jnp.asarray([math.floor(i * h / size[0]) for i in range(size[0])])
        cols = jnp.asarray([math.floor(j * w / size[1]) for j in range(size[1])])
        return self.conv(jnp.take(jnp.take(x, rows, axis=1), cols, axis=2))
