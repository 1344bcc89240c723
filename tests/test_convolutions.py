"""Convolutions in the CPU's formulations are convolutions: compared with PyTorch's."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from diffusion_grpo.models.convolutions import to_few
from diffusion_grpo.models.kernels import planned_for
from diffusion_grpo.models.layers import Upsample2D, conv

KW = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def drawn(layer, seed=0):
    """Give every parameter values that are not zero."""
    state = nnx.state(layer, nnx.Param)
    draw = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), state)
    nnx.update(layer, state)
    return layer


def torch_conv(layer, x, upsample):
    """Return the output and the gradients of Σ sin(output) by PyTorch: picture, kernel, bias."""

    def leaf(values):
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    x = leaf(np.asarray(x).transpose(0, 3, 1, 2))
    kernel = leaf(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1))
    bias = leaf(np.asarray(layer.bias[...]))
    big = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    out = torch.nn.functional.conv2d(big, kernel, bias, padding=kernel.shape[-1] // 2)
    by_x, by_kernel, by_bias = torch.autograd.grad(out.sin().sum(), (x, kernel, bias))
    back = (0, 2, 3, 1)
    return (
        out.detach().numpy().transpose(back),
        by_x.numpy().transpose(back),
        by_kernel.numpy().transpose(2, 3, 1, 0),
        by_bias.numpy(),
    )


def ours(layer, kernel_of, x):
    """Return the same of ours."""
    graphdef, params = nnx.split(layer)

    def loss(params, x):
        out = nnx.merge(graphdef, params)(x)
        return jnp.sin(out).sum(), out

    (gradient, by_x), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    found = kernel_of(gradient)
    return tuple(map(np.asarray, (out, by_x, found["kernel"][...], found["bias"][...])))


def picture(channels, height=5, width=6):
    return jax.random.normal(jax.random.key(1), (2, height, width, channels))


def is_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("differentiated", [True, False])
def test_upsampling_and_its_convolution_are_pytorchs(differentiated):
    layer = drawn(Upsample2D(7, differentiated=differentiated, **KW, rngs=nnx.Rngs(0)))
    x = picture(7)
    is_close(ours(layer, lambda g: g["conv"], x), torch_conv(layer.conv, x, upsample=True))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("few", [True, False])
def test_a_convolution_is_pytorchs(few, size):
    layer = drawn(conv(7, 3, size, few_outputs=few, **KW, rngs=nnx.Rngs(0)))
    x = picture(7)
    is_close(ours(layer, lambda g: g, x), torch_conv(layer, x, upsample=False))


def primitives(function, *args):
    """Count the traced operations by name, those of inner programs included."""
    return collections.Counter(
        line.split(" = ")[1].split("[")[0].split()[0]
        for line in str(jax.make_jaxpr(function)(*args)).splitlines()
        if " = " in line
    )


@pytest.mark.parametrize(("device", "convolutions"), [("cpu", 4), ("gpu", 1), ("tpu", 1)])
def test_other_devices_are_given_the_plain_convolution(device, convolutions):
    layer = Upsample2D(4, differentiated=False, **KW, rngs=nnx.Rngs(0))
    few = conv(8, 3, 3, few_outputs=True, **KW, rngs=nnx.Rngs(0))
    with planned_for(device):
        assert primitives(layer, picture(4))["conv_general_dilated"] == convolutions
        found = primitives(few, picture(8))
    assert found.get("conv_general_dilated", 0) == (0 if device == "cpu" else 1)


def test_what_is_trained_is_given_the_plain_convolution():
    layer = Upsample2D(4, **KW, rngs=nnx.Rngs(0))
    assert primitives(layer, picture(4))["conv_general_dilated"] == 1


def test_half_precision_is_rounded_once():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(1, 8, 8, 64)), jnp.bfloat16)
    kernel = jnp.asarray(draw.normal(size=(3, 3, 64, 3)), jnp.bfloat16)
    out = to_few(x, kernel, (1, 1), ((1, 1), (1, 1)), precision=None)
    expected = torch.nn.functional.conv2d(
        torch.tensor(np.asarray(x, np.float64).transpose(0, 3, 1, 2)),
        torch.tensor(np.asarray(kernel, np.float64).transpose(3, 2, 0, 1)),
        padding=1,
    ).numpy()
    error = np.asarray(out, np.float64) - expected.transpose(0, 2, 3, 1)
    # Half a unit in the last of 8 bits.
    assert out.dtype == jnp.bfloat16
    assert np.all(np.abs(error) <= 2**-8 * np.abs(expected.transpose(0, 2, 3, 1)) + 1e-4)
