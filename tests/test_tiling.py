"""Decoding in tiles and slices, against decoding the whole at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.tiling import decode_tiled, receptive_margin, sliced
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.models.vae_tiny import AutoencoderTiny, TinyVAEConfig
from diffusion_grpo.tensors import abstract_module


@pytest.fixture(scope="module")
def vae():
    config = VAEConfig(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return AutoencoderKL(config, rngs=nnx.Rngs(0))


def _latents(height: int, width: int) -> jax.Array:
    """Latents whose statistics differ from place to place, as an image's do."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).normal(size=(2, height, width, 4))
    envelope = np.exp(-((rows / height - 0.2) ** 2) * 8) + 0.3 * (columns > width / 2)
    return jnp.asarray(
        noise * envelope[None, ..., None] + 0.5 * envelope[None, ..., None], "float32"
    )


def _decode(vae, latents, **options):
    return np.asarray(jax.jit(lambda vae, z: decode_tiled(vae, z, **options))(vae, latents))


def _whole(vae, latents):
    return np.asarray(jax.jit(lambda vae, z: vae.decode(z))(vae, latents))


def test_margin_is_the_reach_of_the_convolutions(vae):
    """Change one latent: what changes in the image is what the margin says, and no more.

    GroupNorms, which spread a change over the image, are given fixed statistics.
    """
    from diffusion_grpo.models.norms import Statistics, using

    def decode(vae, z):
        fixed = tuple((jnp.zeros((1, 4)), jnp.ones((1, 4))) for _ in range(50))
        with using(Statistics(jnp.ones(z.shape[1:3]), fixed)):
            return vae.decode_local(z)

    z = np.random.default_rng(0).normal(size=(1, 23, 23, 16)).astype(np.float32)
    changed = z.copy()
    changed[0, 11, 11] += 1
    decode = jax.jit(decode)
    moved = np.abs(decode(vae, jnp.asarray(z)) - decode(vae, jnp.asarray(changed)))[0].max(axis=-1)
    rows = np.flatnonzero(moved.max(axis=1))
    assert rows.min() // 2 == 11 - vae.decoder_margin
    assert rows.max() // 2 == 11 + vae.decoder_margin


def test_margin_of_the_published_autoencoders():
    sd = VAEConfig(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    abstract = abstract_module(AutoencoderKL, sd)
    # one convolution after the upsampling, six in three residual blocks, one to the colors
    assert abstract.decoder_margin == 8 / 2 and abstract.local_scale == 2
    tiny = abstract_module(AutoencoderTiny, TinyVAEConfig())
    # 5 at the image's resolution, then each time half of that and 10 more
    assert tiny.decoder_margin == 19 == receptive_margin([10, 10, 10, 5])
    assert tiny.local_scale == 8


@pytest.mark.parametrize("size", [(9, 11), (5, 14)], ids=str)
def test_tiles_are_the_whole(vae, size):
    """Latents of two halves of an image differ in scale, as do the tiles' own statistics."""
    latents = _latents(*size)
    whole, tiled = _whole(vae, latents), _decode(vae, latents, tile=20)
    assert np.abs(tiled - whole).max() <= 1e-5 * np.abs(whole).max()


def test_tiny_autoencoder_in_tiles_is_the_whole():
    config = TinyVAEConfig(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny = AutoencoderTiny(config, rngs=nnx.Rngs(0))
    latents = _latents(21, 20)
    whole = _whole(tiny, latents)
    assert np.abs(_decode(tiny, latents, tile=32) - whole).max() <= 1e-5 * np.abs(whole).max()


def test_slices_are_the_whole(vae):
    latents = _latents(6, 5)
    one_by_one = jax.jit(lambda vae, z: sliced(vae.decode, z))(vae, latents)
    np.testing.assert_allclose(one_by_one, _whole(vae, latents), rtol=1e-5, atol=1e-6)


def test_small_images_are_decoded_whole_and_small_tiles_refused(vae):
    latents = _latents(6, 5)
    whole = _whole(vae, latents)
    np.testing.assert_allclose(_decode(vae, latents, tile=24), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="vae_tile is 12 pixels.*at least 14"):
        _decode(vae, latents, tile=12)
