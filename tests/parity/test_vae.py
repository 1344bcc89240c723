import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_checkpoints import make_vae, randomize
from torch_weights import copy_torch_weights

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig


def _nhwc(x):
    return x.detach().float().numpy().transpose(0, 2, 3, 1)


def _relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


def _pair(dtype=jnp.float32, **fields):
    theirs = randomize(make_vae(**fields))
    ours = AutoencoderKL(VAEConfig.from_dict(dict(theirs.config)), dtype=dtype, rngs=nnx.Rngs(0))
    copy_torch_weights(theirs, ours)
    return theirs, ours


VARIANTS = pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layers_per_block": 2, "latent_channels": 8},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)


@VARIANTS
def test_encode(fields):
    theirs, ours = _pair(**fields)
    images = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        expected = theirs.encode(images).latent_dist
    mean, logvar = jax.jit(lambda m, x: m.encode(x))(ours, jnp.asarray(_nhwc(images)))
    assert _relative_error(mean, _nhwc(expected.mean)) <= 1e-4
    assert _relative_error(logvar, _nhwc(expected.logvar)) <= 1e-4


@VARIANTS
def test_decode(fields):
    theirs, ours = _pair(**fields)
    latents = torch.randn(2, theirs.config.latent_channels, 6, 8)
    with torch.no_grad():
        expected = _nhwc(theirs.decode(latents).sample)
    decoded = jax.jit(lambda m, x: m.decode(x))(ours, jnp.asarray(_nhwc(latents)))
    assert _relative_error(decoded, expected) <= 1e-4


@pytest.mark.parametrize(
    "part", ["conv_in", "mid_block", "up_blocks.0", "up_blocks.2", "conv_norm_out"]
)
def test_decoder_block_by_block(part):
    theirs, ours = _pair()
    torch_block = theirs.decoder.get_submodule(part)
    block = ours.decoder
    for name in part.split("."):
        block = block[int(name)] if name.isdigit() else getattr(block, name)
    channels = next(
        p for p in torch_block.parameters() if p.ndim == 4 or part == "conv_norm_out"
    ).shape
    width = channels[1] if len(channels) == 4 else channels[0]
    x = torch.randn(2, width, 6, 4)
    with torch.no_grad():
        expected = _nhwc(torch_block(x))
    ours_out = jax.jit(lambda m, x: m(x))(block, jnp.asarray(_nhwc(x)))
    assert _relative_error(ours_out, expected) <= 1e-5


def test_many_pixels_attend_in_parts(monkeypatch):
    theirs, ours = _pair()
    monkeypatch.setattr("diffusion_grpo.models.vae.QUERIES", 16)
    latents = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        expected = _nhwc(theirs.decode(latents).sample)
    decoded = jax.jit(lambda m, x: m.decode(x))(ours, jnp.asarray(_nhwc(latents)))
    assert _relative_error(decoded, expected) <= 1e-4


def test_bfloat16_is_close():
    theirs, ours = _pair(dtype=jnp.bfloat16)
    latents = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        expected = _nhwc(theirs.decode(latents).sample)
    out = jax.jit(lambda m, x: m.decode(x))(ours, jnp.asarray(_nhwc(latents)))
    assert np.abs(np.asarray(out, np.float32) - expected).std() / expected.std() < 0.03


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"scaling": 0.1}, "did you mean 'scaling_factor'"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(fields, named):
    with pytest.raises(UsageError, match=named):
        VAEConfig.from_dict(fields)
