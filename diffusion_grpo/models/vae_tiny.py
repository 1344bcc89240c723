"""`AutoencoderTiny`: a small distilled autoencoder (TAESD), as Diffusers defines it.

It decodes in a fraction of the time of the autoencoder it stands for, at some loss of detail: for
previews, and for rewards that bear it. In NHWC layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.layers import DType, activation, conv
from diffusion_grpo.models.tiling import receptive_margin
from diffusion_grpo.models.unet_config import config_values


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """The fields of `AutoencoderTiny` that are implemented, with Diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    scaling_factor: float = 1.0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TinyVAEConfig:
        """Build the configuration from a checkpoint's `vae/config.json`.

        Raises:
            UsageError: a field, or a field's value, is not supported; the message names it.
        """
        # Diffusers writes a copy of decoder_block_out_channels under a name that it never reads.
        fields = {k: v for k, v in fields.items() if k != "block_out_channels"}
        config = cls(**config_values(cls, fields, _UNSUPPORTED_DEFAULTS, "AutoencoderTiny"))
        for side in ("encoder", "decoder"):
            widths = getattr(config, f"{side}_block_out_channels")
            blocks = getattr(config, f"num_{side}_blocks")
            if len(widths) != len(blocks) or len(set(widths)) != 1:
                raise UsageError(
                    f"AutoencoderTiny config: {side}_block_out_channels={list(widths)} is not "
                    f"supported with num_{side}_blocks={list(blocks)}; expected one width, "
                    f"{len(blocks)} times"
                )
        return config

    @property
    def downscale_factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)


_UNSUPPORTED_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "upsample_fn": ("nearest",),
    "force_upcast": (False,),
    "shift_factor": (0, 0.0, None),
}


class Activation(nnx.Module):
    """An activation at its place in a numbered list of layers."""

    def __init__(self, act_fn: str):
        """Build it by name."""
        self.act = activation(act_fn, "act_fn")

    def __call__(self, x: Array) -> Array:
        """Apply it."""
        return self.act(x)


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling by a whole factor."""

    def __init__(self, factor: int):
        """Build it."""
        self.factor = factor

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W c"]:
        """Map [B, h, w, c] to [B, factor·h, factor·w, c]."""
        return x.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


class AutoencoderTinyBlock(nnx.Module):
    """Residual block: relu(x + conv(act(conv(act(conv(x))))))."""

    def __init__(self, channels: int, act_fn: str, **kw: Any):
        """Build it for `channels` in and out."""
        self.conv = nnx.List(
            [
                conv(channels, channels, 3, **kw),
                Activation(act_fn),
                conv(channels, channels, 3, **kw),
                Activation(act_fn),
                conv(channels, channels, 3, **kw),
            ]
        )

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Map [B, h, w, c] to the same shape."""
        h = x
        for layer in self.conv:
            h = layer(h)
        return jax.nn.relu(h + x)


class EncoderTiny(nnx.Module):
    """Images to latents."""

    def __init__(self, config: TinyVAEConfig, **kw: Any):
        """Build it."""
        width = config.encoder_block_out_channels[0]
        layers: list[nnx.Module] = []
        for level, count in enumerate(config.num_encoder_blocks):
            if level == 0:
                layers.append(conv(config.in_channels, width, 3, **kw))
            else:
                layers.append(conv(width, width, 3, stride=2, use_bias=False, **kw))
            layers += [AutoencoderTinyBlock(width, config.act_fn, **kw) for _ in range(count)]
        layers.append(conv(width, config.latent_channels, 3, **kw))
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
        """Map images in [−1, 1] to latents."""
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(nnx.Module):
    """Latents to images."""

    def __init__(self, config: TinyVAEConfig, **kw: Any):
        """Build it."""
        width = config.decoder_block_out_channels[0]
        last = len(config.num_decoder_blocks) - 1
        layers = [conv(config.latent_channels, width, 3, **kw), Activation(config.act_fn)]
        for level, count in enumerate(config.num_decoder_blocks):
            layers += [AutoencoderTinyBlock(width, config.act_fn, **kw) for _ in range(count)]
            if level < last:
                layers.append(Upsample(config.upsampling_scaling_factor))
                layers.append(conv(width, width, 3, use_bias=False, **kw))
            else:
                layers.append(conv(width, config.out_channels, 3, **kw))
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Map latents to images, about [−1, 1]; latents are squashed softly to ±3 first."""
        x = 3 * jnp.tanh(x / 3)
        for layer in self.layers:
            x = layer(x)
        return 2 * x - 1


class AutoencoderTiny(nnx.Module):
    """A small autoencoder between images and latents, without a distribution.

    Its latents are the diffusion model's own: `scaling_factor` is 1.
    """

    def __init__(
        self,
        config: TinyVAEConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the network (arguments as `UNet2DConditionModel`)."""
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.encoder = EncoderTiny(config, **kw)
        self.decoder = DecoderTiny(config, **kw)

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
        """Encode images in [−1, 1] to latents."""
        return self.encoder(images.astype(self.dtype))

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Decode latents to images, about [−1, 1] (not clipped)."""
        return self.decode_local(self.decode_global(latents))

    def decode_global(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return the latents: nothing here needs the whole image; see `tiling`."""
        return latents.astype(self.dtype)

    def decode_local(self, features: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Decode them."""
        return self.decoder(features)

    @property
    def local_scale(self) -> int:
        """Image pixels a latent pixel, along one side."""
        return self.config.downscale_factor

    @property
    def decoder_margin(self) -> int:
        """Latent pixels around a tile that its decoded pixels depend on."""
        levels = [1 + 3 * blocks for blocks in self.config.num_decoder_blocks]
        levels[-1] += 1  # the last convolution
        return receptive_margin(levels, self.config.upsampling_scaling_factor)
