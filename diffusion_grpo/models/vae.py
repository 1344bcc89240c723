"""`AutoencoderKL`: the autoencoder of Stable Diffusion, as Diffusers defines it, in NHWC layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.attention import Attention
from diffusion_grpo.models.layers import (
    Downsample2D,
    DType,
    ResnetBlock2D,
    Upsample2D,
    activation,
    conv,
)
from diffusion_grpo.models.norms import group_norm
from diffusion_grpo.models.tiling import receptive_margin
from diffusion_grpo.models.unet_config import config_values

QUERIES = 4096  # pixels that attend at a time
EPS = 1e-6  # Diffusers' VAE blocks fix it; it is not a config field.


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of `AutoencoderKL` that this module implements, with Diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VAEConfig:
        """Build the configuration from a checkpoint's `vae/config.json`.

        Raises:
            UsageError: a field, or a field's value, is not supported; the message names it.
        """
        config = cls(**config_values(cls, fields, UNSUPPORTED_DEFAULTS, "AutoencoderKL"))
        n = len(config.block_out_channels)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            blocks = getattr(config, name)
            if len(blocks) != n or set(blocks) != {kind}:
                raise UsageError(
                    f"AutoencoderKL config: {name}={list(blocks)} is not supported; "
                    f"expected {n} × {kind!r}"
                )
        return config

    @property
    def downscale_factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


UNSUPPORTED_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
}


def _resnet(config: VAEConfig, in_channels: int, out: int, **kw: Any) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out,
        temb_channels=None,
        groups=config.norm_num_groups,
        eps=EPS,
        act_fn=config.act_fn,
        **kw,
    )


class AttentionBlock(Attention):
    """Single-head self-attention over pixels, with its own GroupNorm and residual connection."""

    def __init__(self, channels: int, groups: int, **kw: Any):
        """Build it for `channels`."""
        super().__init__(channels, heads=1, head_dim=channels, bias=True, **kw)
        self.group_norm = group_norm(groups, channels, EPS, **kw)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:  # type: ignore[override]
        """Map [B, h, w, c] to the same shape."""
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)
        return x + self._attend(tokens).reshape(b, h, w, c)

    def _attend(self, tokens: Float[Array, "B n c"]) -> Float[Array, "B n c"]:
        """Attend from some of many pixels at a time: all scores of 128×128 would take 1 GB."""
        b, n, c = tokens.shape
        if n <= QUERIES or n % QUERIES:
            return super().__call__(tokens)
        parts = tokens.reshape(b, n // QUERIES, QUERIES, c).swapaxes(0, 1)
        out = jax.lax.map(lambda part: Attention.__call__(self, part, tokens), parts)
        return out.swapaxes(0, 1).reshape(b, n, c)


class MidBlock(nnx.Module):
    """The bottleneck: residual block, attention, residual block."""

    def __init__(self, config: VAEConfig, **kw: Any):
        """Build it at the width of the last block."""
        width = config.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(config, width, width, **kw) for _ in range(2)])
        if config.mid_block_add_attention:
            self.attentions = nnx.List([AttentionBlock(width, config.norm_num_groups, **kw)])

    def __call__(self, x: Array) -> Array:
        """Map [B, h, w, c] to the same shape."""
        x = self.resnets[0](x)
        for attention in getattr(self, "attentions", ()):
            x = attention(x)
        return self.resnets[1](x)


class DownEncoderBlock2D(nnx.Module):
    """Residual blocks, then (but for the last block) a strided convolution."""

    def __init__(self, config: VAEConfig, in_channels: int, out: int, downsample: bool, **kw: Any):
        """Build it from `in_channels` to `out`."""
        self.resnets = nnx.List(
            [
                _resnet(config, in_channels if i == 0 else out, out, **kw)
                for i in range(config.layers_per_block)
            ]
        )
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(out, padding=0, **kw)])

    def __call__(self, x: Array) -> Array:
        """Map [B, h, w, in] to [B, h/2, w/2, out]."""
        for layer in (*self.resnets, *getattr(self, "downsamplers", ())):
            x = layer(x)
        return x


class UpDecoderBlock2D(nnx.Module):
    """Residual blocks, then (but for the last block) nearest upsampling and a convolution."""

    def __init__(self, config: VAEConfig, in_channels: int, out: int, upsample: bool, **kw: Any):
        """Build it from `in_channels` to `out`."""
        self.resnets = nnx.List(
            [
                _resnet(config, in_channels if i == 0 else out, out, **kw)
                for i in range(config.layers_per_block + 1)
            ]
        )
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(out, differentiated=False, **kw)])

    def __call__(self, x: Array) -> Array:
        """Map [B, h, w, in] to [B, 2h, 2w, out]."""
        x = self.before_upsampling(x)
        for upsampler in getattr(self, "upsamplers", ()):
            x = upsampler(x)
        return x

    def before_upsampling(self, x: Array) -> Array:
        """Map [B, h, w, in] to [B, h, w, out]."""
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Encoder(nnx.Module):
    """Images to the mean and log-variance of the latents."""

    def __init__(self, config: VAEConfig, **kw: Any):
        """Build it."""
        channels = config.block_out_channels
        last = len(channels) - 1
        self.conv_in = conv(config.in_channels, channels[0], 3, **kw)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(config, channels[max(i - 1, 0)], out, i < last, **kw)
                for i, out in enumerate(channels)
            ]
        )
        self.mid_block = MidBlock(config, **kw)
        self.conv_norm_out = group_norm(config.norm_num_groups, channels[-1], EPS, **kw)
        self.conv_out = conv(channels[-1], 2 * config.latent_channels, 3, **kw)
        self.act = activation(config.act_fn, "act_fn")

    def __call__(self, x: Array) -> Array:
        """Map [B, H, W, 3] to [B, h, w, 2·latent_channels]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.act(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, config: VAEConfig, **kw: Any):
        """Build it."""
        channels = config.block_out_channels[::-1]
        last = len(channels) - 1
        self.conv_in = conv(config.latent_channels, channels[0], 3, **kw)
        self.mid_block = MidBlock(config, **kw)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(config, channels[max(i - 1, 0)], out, i < last, **kw)
                for i, out in enumerate(channels)
            ]
        )
        self.conv_norm_out = group_norm(config.norm_num_groups, channels[-1], EPS, **kw)
        self.conv_out = conv(channels[-1], config.out_channels, 3, few_outputs=True, **kw)
        self.act = activation(config.act_fn, "act_fn")

    def __call__(self, x: Array) -> Array:
        """Map [B, h, w, latent_channels] to [B, H, W, 3]."""
        return self.last(self.before_last(x))

    def before_last(self, x: Array) -> Array:
        """Map [B, h, w, latent_channels] to the features before the last upsampling."""
        x = self.mid_block(self.conv_in(x))
        *blocks, final = self.up_blocks
        for i, block in enumerate(blocks):
            x = block(x) if i < len(blocks) - 1 else block.before_upsampling(x)
        return x

    def last(self, x: Array) -> Array:
        """Map the features before the last upsampling to [B, H, W, 3]."""
        *blocks, final = self.up_blocks
        for upsampler in blocks[-1].upsamplers if blocks else ():
            x = upsampler(x)
        return self.conv_out(self.act(self.conv_norm_out(final(x))))


class AutoencoderKL(nnx.Module):
    """Variational autoencoder between images and latents.

    Latents for the diffusion model are z · scaling_factor; the factor is applied by the caller.
    Source: Kingma and Welling 2014; Rombach et al. 2022; Diffusers' `AutoencoderKL`.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the network (arguments as `UNet2DConditionModel`)."""
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, **kw)
        self.decoder = Decoder(config, **kw)
        z = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = conv(2 * z, 2 * z, 1, **kw)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(z, z, 1, **kw)

    def encode(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Encode images in [−1, 1] to the unscaled latents' mean and log-variance.

        The log-variance is clipped to [−30, 20].
        """
        moments = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Decode unscaled latents to images, about [−1, 1] (not clipped)."""
        return self.decode_local(self.decode_global(latents))

    def decode_global(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 d"]:
        """Decode as far as the last upsampling; see `tiling`."""
        z = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder.before_last(z)

    def decode_local(self, features: Float[Array, "B h2 w2 d"]) -> Float[Array, "B H W 3"]:
        """Decode the rest, from the last upsampling on: convolutions and GroupNorms."""
        return self.decoder.last(features)

    @property
    def local_scale(self) -> int:
        """Image pixels a feature of `decode_local`, along one side."""
        return min(2, len(self.config.block_out_channels))

    @property
    def decoder_margin(self) -> int:
        """Features around a tile that `decode_local` depends on."""
        resnets = 2 * (self.config.layers_per_block + 1)
        # the upsampler's convolution, the block's, and the last one
        return receptive_margin([0, 1 + resnets + 1] if self.local_scale == 2 else [resnets + 1])
