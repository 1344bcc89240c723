import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as TorchTiny
from flax import nnx
from torch_checkpoints import randomize
from torch_weights import copy_torch_weights, max_relative_error

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.vae_tiny import AutoencoderTiny, TinyVAEConfig
from diffusion_grpo.tensors import abstract_module

SMALL = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}


def _pair(**fields):
    theirs = randomize(TorchTiny(**SMALL | fields).eval())
    config = TinyVAEConfig.from_dict(dict(theirs.config))
    ours = abstract_module(AutoencoderTiny, config)
    copy_torch_weights(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("fields", [{}, {"act_fn": "silu", "latent_channels": 6}], ids=str)
def test_encode_and_decode(fields):
    theirs, ours = _pair(**fields)
    images = torch.randn(2, 3, 24, 32)
    latents = 3 * torch.randn(2, theirs.config.latent_channels, 6, 8)  # some beyond the squashing
    with torch.no_grad():
        encoded, decoded = theirs.encode(images).latents, theirs.decode(latents).sample
    ours = jax.jit(lambda m, x, z: (m.encode(x), m.decode(z)))(
        ours, *(jnp.asarray(t.permute(0, 2, 3, 1).numpy()) for t in (images, latents))
    )
    assert max_relative_error(ours[0], encoded.permute(0, 2, 3, 1)) <= 1e-4
    assert max_relative_error(ours[1], decoded.permute(0, 2, 3, 1)) <= 1e-4


def test_published_configuration_describes_taesd():
    with torch.device("meta"):
        theirs = TorchTiny()
    config = TinyVAEConfig.from_dict(dict(theirs.config))
    ours = abstract_module(AutoencoderTiny, config)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(ours)))
    assert count == sum(p.numel() for p in theirs.parameters())
    assert config.downscale_factor == 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
        ({"decoder_block_out_channels": [64, 64, 32, 64]}, "decoder_block_out_channels"),
        ({"shift_factor": 0.1}, "shift_factor"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(fields, named):
    with pytest.raises(UsageError, match=named):
        TinyVAEConfig.from_dict(fields)
