"""`UNet2DConditionModel`: the denoising network of Stable Diffusion, as Diffusers defines it.

The module tree, the attribute names and the configuration's fields (`unet_config`) are Diffusers'.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from diffusion_grpo.models.layers import (
    Downsample2D,
    DType,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    activation,
    checkpointed,
    conv,
    group_norm,
    sinusoidal_embedding,
)
from diffusion_grpo.models.unet_config import UNetConfig


class DownBlock2D(nnx.Module):
    """Residual blocks on the way down.

    In the cross-attention kind, each is followed by a spatial transformer.
    """

    def __init__(
        self,
        config: UNetConfig,
        index: int,
        in_channels: int,
        temb_channels: int,
        **kw: Any,
    ):
        """Build block `index` of the way down."""
        out = config.block_out_channels[index]
        cross = config.down_block_types[index] == "CrossAttnDownBlock2D"
        self.resnets = nnx.List(
            [
                _resnet(config, in_channels if i == 0 else out, out, temb_channels, **kw)
                for i in range(config.layers_per_block)
            ]
        )
        if cross:
            self.attentions = nnx.List(
                [_transformer(config, index, out, **kw) for _ in range(config.layers_per_block)]
            )
        if index < len(config.block_out_channels) - 1:
            self.downsamplers = nnx.List(
                [Downsample2D(out, padding=config.downsample_padding, **kw)]
            )

    def __call__(
        self, x: Array, temb: Array, context: Array, remat: bool
    ) -> tuple[Array, tuple[Array, ...]]:
        """Return the block's output and the skip connections it leaves."""
        skips = []
        attentions = getattr(self, "attentions", None)
        for i, resnet in enumerate(self.resnets):
            x = checkpointed(resnet, remat, x, temb)
            if attentions is not None:
                x = checkpointed(attentions[i], remat, x, context)
            skips.append(x)
        for downsampler in getattr(self, "downsamplers", ()):
            x = downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class UNetMidBlock2D(nnx.Module):
    """The bottleneck: one residual block.

    In the cross-attention kind, a transformer and another residual block follow.
    """

    def __init__(self, config: UNetConfig, temb_channels: int, **kw: Any):
        """Build it at the width of the last block."""
        width = config.block_out_channels[-1]
        cross = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nnx.List(
            [_resnet(config, width, width, temb_channels, **kw) for _ in range(2 if cross else 1)]
        )
        if cross:
            self.attentions = nnx.List([_transformer(config, -1, width, **kw)])

    def __call__(self, x: Array, temb: Array, context: Array, remat: bool) -> Array:
        """Map [B, h, w, c] to the same shape."""
        x = checkpointed(self.resnets[0], remat, x, temb)
        for attention, resnet in zip(
            getattr(self, "attentions", ()), self.resnets[1:], strict=True
        ):
            x = checkpointed(attention, remat, x, context)
            x = checkpointed(resnet, remat, x, temb)
        return x


class UpBlock2D(nnx.Module):
    """Residual blocks on the way up, each fed one skip connection; see `DownBlock2D`."""

    def __init__(self, config: UNetConfig, index: int, temb_channels: int, **kw: Any):
        """Build block `index` of the way up (0 is the lowest resolution)."""
        n = len(config.block_out_channels)
        reversed_channels = config.block_out_channels[::-1]
        out = reversed_channels[index]
        previous = reversed_channels[max(index - 1, 0)]
        skip_last = reversed_channels[min(index + 1, n - 1)]
        layers = config.layers_per_block + 1
        self.resnets = nnx.List(
            [
                _resnet(
                    config,
                    (previous if i == 0 else out) + (skip_last if i == layers - 1 else out),
                    out,
                    temb_channels,
                    **kw,
                )
                for i in range(layers)
            ]
        )
        if config.up_block_types[index] == "CrossAttnUpBlock2D":
            self.attentions = nnx.List(
                [_transformer(config, n - 1 - index, out, **kw) for _ in range(layers)]
            )
        if index < n - 1:
            self.upsamplers = nnx.List([Upsample2D(out, **kw)])

    def __call__(
        self,
        x: Array,
        skips: tuple[Array, ...],
        temb: Array,
        context: Array,
        size: tuple[int, int] | None,
        remat: bool,
    ) -> Array:
        """Consume `skips` from the last to the first; `size` is the resolution to upsample to."""
        attentions = getattr(self, "attentions", None)
        for i, resnet in enumerate(self.resnets):
            x = checkpointed(resnet, remat, jnp.concatenate([x, skips[-1 - i]], axis=-1), temb)
            if attentions is not None:
                x = checkpointed(attentions[i], remat, x, context)
        for upsampler in getattr(self, "upsamplers", ()):
            x = upsampler(x, size)
        return x


def _resnet(
    config: UNetConfig, in_channels: int, out: int, temb_channels: int, **kw: Any
) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out,
        temb_channels=temb_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act_fn=config.act_fn,
        time_scale_shift=config.resnet_time_scale_shift,
        **kw,
    )


def _transformer(config: UNetConfig, index: int, channels: int, **kw: Any) -> Transformer2DModel:
    return Transformer2DModel(
        channels,
        heads=config.heads[index],
        depth=config.depths[index],
        context_dim=config.cross_attention_dim,
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        **kw,
    )


class UNet2DConditionModel(nnx.Module):
    """Predict the noise (or velocity, or clean sample) in noisy latents.

    It is given the timestep and text embeddings. The scheduler's `prediction_type` says which of
    the three the output is; the network is the same.
    Source: Rombach et al. 2022; Diffusers' `UNet2DConditionModel`.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            config: the checkpoint's configuration.
            dtype: the compute dtype (float32 or bfloat16).
            param_dtype: the dtype of the parameters.
            rngs: the source of the initial parameters.
        """
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels = config.block_out_channels
        temb = 4 * channels[0]
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = False
        self.conv_in = conv(config.in_channels, channels[0], 3, **kw)
        self.time_embedding = TimestepEmbedding(channels[0], temb, config.act_fn, **kw)
        self.down_blocks = nnx.List(
            [
                DownBlock2D(config, i, channels[max(i - 1, 0)], temb, **kw)
                for i in range(len(channels))
            ]
        )
        if config.mid_block_type is not None:
            self.mid_block = UNetMidBlock2D(config, temb, **kw)
        self.up_blocks = nnx.List([UpBlock2D(config, i, temb, **kw) for i in range(len(channels))])
        self.conv_norm_out = group_norm(config.norm_num_groups, channels[0], config.norm_eps, **kw)
        self.conv_out = conv(channels[0], config.out_channels, 3, **kw)
        self.act = activation(config.act_fn, "act_fn")

    def __call__(
        self,
        sample: Float[Array, "B h w c"],
        timesteps: Num[Array, " B"],
        encoder_hidden_states: Float[Array, "B n d"],
    ) -> Float[Array, "B h w o"]:
        """Predict from noisy latents.

        Args:
            sample: noisy latents x_t, [B, h, w, in_channels].
            timesteps: the training timestep of each, [B], 0 … num_train_timesteps−1.
            encoder_hidden_states: text embeddings, [B, n, cross_attention_dim].

        Returns:
            The model's prediction, [B, h, w, out_channels], in the compute dtype.
        """
        config = self.config
        remat = self.gradient_checkpointing
        x = sample.astype(self.dtype)
        context = encoder_hidden_states.astype(self.dtype)
        if config.center_input_sample:
            x = 2 * x - 1
        sinusoid = sinusoidal_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        temb = self.time_embedding(sinusoid.astype(self.dtype))

        x = self.conv_in(x)
        skips: tuple[Array, ...] = (x,)
        for block in self.down_blocks:
            x, new = block(x, temb, context, remat)
            skips += new
        if config.mid_block_type is not None:
            x = self.mid_block(x, temb, context, remat)
        for block in self.up_blocks:
            used = len(block.resnets)
            block_skips, skips = skips[-used:], skips[:-used]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = block(x, block_skips, temb, context, size, remat)
        return self.conv_out(self.act(self.conv_norm_out(x)))
