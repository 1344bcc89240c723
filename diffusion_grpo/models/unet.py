"""`UNet2DConditionModel`: the denoising network of Stable Diffusion, as Diffusers defines it.

The module tree, the attribute names and the configuration's fields (`unet_config`) are Diffusers'.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.attention import DualTransformer2DModel, Transformer2DModel
from diffusion_grpo.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from diffusion_grpo.models.layers import (
    Downsample2D,
    DType,
    Identity,
    ResnetBlock2D,
    Upsample2D,
    activation,
    checkpointed,
    conv,
)
from diffusion_grpo.models.norms import group_norm
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
                for i in range(config.layers[index])
            ]
        )
        if cross:
            self.attentions = nnx.List(
                [_transformer(config, index, depth, **kw) for depth in config.depths(index)]
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
        scale = config.mid_block_scale_factor
        self.resnets = nnx.List(
            [
                _resnet(config, width, width, temb_channels, output_scale=scale, **kw)
                for _ in range(2 if cross else 1)
            ]
        )
        if cross:
            # Diffusers' middle block takes no only_cross_attention.
            depth = config.depths(-1)[0]
            transformer = _transformer(config, -1, depth, only_cross_attention=False, **kw)
            self.attentions = nnx.List([transformer])

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
        layers = config.layers[n - 1 - index] + 1
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
                [
                    _transformer(config, n - 1 - index, depth, **kw)
                    for depth in config.up_depths(index)
                ]
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


def _transformer(
    config: UNetConfig,
    index: int,
    depth: int,
    *,
    only_cross_attention: bool | None = None,
    **kw: Any,
) -> Transformer2DModel | DualTransformer2DModel:
    """Build a spatial transformer of the block that is `index` on the way down."""
    channels = config.block_out_channels[index]
    kw |= {
        "heads": config.heads[index],
        "context_dim": config.per_block("cross_attention_dim")[index],
        "groups": config.norm_num_groups,
    }
    if config.dual_cross_attention:  # of these fields, it takes no more
        return DualTransformer2DModel(channels, **kw)
    given = config.per_block("only_cross_attention")[index]
    return Transformer2DModel(
        channels,
        depth=depth,
        linear_projection=config.use_linear_projection,
        only_cross_attention=bool(given if only_cross_attention is None else only_cross_attention),
        upcast=bool(config.upcast_attention),  # null in some files
        **kw,
    )


def _class_embedding(config: UNetConfig, **kw: Any) -> Any:
    """Build what embeds class labels, or return None."""
    width = config.time_embed_dim
    if config.class_embed_type is None:
        if config.num_class_embeds is None:
            return None
        return nnx.Embed(config.num_class_embeds, width, **kw)
    if config.class_embed_type == "timestep":
        return TimestepEmbedding(config.block_out_channels[0], width, config.act_fn, **kw)
    if config.class_embed_type == "identity":
        return Identity()
    given = config.projection_class_embeddings_input_dim
    assert given is not None  # UNetConfig.validate
    if config.class_embed_type == "projection":
        return TimestepEmbedding(given, width, **kw)
    return nnx.Linear(given, width, **kw)


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
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = False
        self.conv_in = conv(config.in_channels, channels[0], config.conv_in_kernel, **kw)
        self.time_embedding = TimestepEmbedding(
            channels[0], config.time_embed_dim, config.act_fn, config.timestep_post_act, **kw
        )
        if config.has_class_embedding:
            self.class_embedding = _class_embedding(config, **kw)
        if config.addition_embed_type == "text_time":
            given = config.projection_class_embeddings_input_dim
            assert given is not None  # UNetConfig.validate
            self.add_embedding = TimestepEmbedding(given, config.time_embed_dim, **kw)
        temb = config.time_embed_dim * (2 if config.class_embeddings_concat else 1)
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
        self.conv_out = conv(channels[0], config.out_channels, config.conv_out_kernel, **kw)
        self.act = activation(config.act_fn, "act_fn")

    def __call__(
        self,
        sample: Float[Array, "B h w c"],
        timesteps: Num[Array, " B"],
        encoder_hidden_states: Float[Array, "P n d"],
        *,
        class_labels: Num[Array, "B ..."] | None = None,
        text_embeds: Float[Array, "P p"] | None = None,
        time_ids: Num[Array, "P k"] | None = None,
    ) -> Float[Array, "B h w o"]:
        """Predict from noisy latents.

        Several images in a row may share a prompt, as those of a group do: given P prompts for B
        images, each is that of B/P consecutive ones, and what is computed of it is computed once.

        Args:
            sample: noisy latents x_t, [B, h, w, in_channels].
            timesteps: the training timestep of each, [B], 0 … num_train_timesteps−1.
            encoder_hidden_states: text embeddings, [P, n, cross_attention_dim], P a divisor of B.
            class_labels: as `class_embed_type` has it: class numbers or noise levels [B], or
                vectors [B, projection_class_embeddings_input_dim].
            text_embeds: pooled text embeddings [P, p] (SDXL).
            time_ids: original size, crop corner and target size in pixels [P, 6] (SDXL).

        Returns:
            The model's prediction, [B, h, w, out_channels], in the compute dtype.

        Raises:
            UsageError: an input that the configuration asks for is missing, or one that it has no
                use for is given; the prompts do not divide the images.
        """
        config = self.config
        remat = self.gradient_checkpointing
        _check_inputs(config, class_labels=class_labels, text_embeds=text_embeds, time_ids=time_ids)
        each = _images_per_prompt(len(sample), len(encoder_hidden_states))
        x = sample.astype(self.dtype)
        context = encoder_hidden_states.astype(self.dtype)
        if config.center_input_sample:
            x = 2 * x - 1
        temb = self.time_embedding(self._sinusoid(timesteps, config.block_out_channels[0]))
        if class_labels is not None:
            embedded = self._embed_class(class_labels)
            together = config.class_embeddings_concat
            temb = jnp.concatenate([temb, embedded], axis=-1) if together else temb + embedded
        if text_embeds is not None and time_ids is not None:
            ids = self._sinusoid(time_ids.reshape(-1), config.addition_time_embed_dim or 0)
            added = (text_embeds.astype(self.dtype), ids.reshape(len(time_ids), -1))
            embedded = self.add_embedding(jnp.concatenate(added, axis=-1))
            temb = temb + jnp.repeat(embedded, each, axis=0)
        if config.time_embedding_act_fn is not None:
            temb = activation(config.time_embedding_act_fn, "time_embedding_act_fn")(temb)

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

    def _sinusoid(self, values: Num[Array, " B"], dim: int) -> Float[Array, "B d"]:
        config = self.config
        flip, shift = config.flip_sin_to_cos, config.freq_shift
        embedding = sinusoidal_embedding(values, dim, flip_sin_to_cos=flip, freq_shift=shift)
        return embedding.astype(self.dtype)

    def _embed_class(self, labels: Num[Array, "B ..."]) -> Float[Array, "B d"]:
        if self.config.class_embed_type == "timestep":
            labels = self._sinusoid(labels, self.config.block_out_channels[0])
        elif self.config.class_embed_type is not None:
            labels = labels.astype(self.dtype)
        return self.class_embedding(labels)


def _images_per_prompt(images: int, prompts: int) -> int:
    if images % prompts:
        raise UsageError(
            f"encoder_hidden_states has {prompts} rows for {images} images; expected one an image, "
            "or a divisor of their number, each for as many consecutive images"
        )
    return images // prompts


def _check_inputs(config: UNetConfig, **given: Array | None) -> None:
    for name, value in given.items():
        if name == "class_labels":
            field, needed = "class_embed_type or num_class_embeds", config.has_class_embedding
        else:
            field = f"addition_embed_type={config.addition_embed_type!r}"
            needed = config.addition_embed_type == "text_time"
        if needed and value is None:
            raise UsageError(f"{name} is missing: this UNet's {field} needs it")
        if value is not None and not needed:
            raise UsageError(f"{name} is given, but this UNet has no use for it ({field})")
