"""The configuration of `UNet2DConditionModel`, read strictly from a checkpoint's JSON.

The fields are Diffusers'. A field whose value is not supported is an error that names it; none is
ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_grpo.errors import UsageError, suggest

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of `UNet2DConditionModel` that are implemented, with Diffusers' defaults."""

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UNetConfig:
        """Build the configuration from a checkpoint's `unet/config.json`.

        Args:
            fields: the JSON object; keys with a leading underscore are Diffusers' own notes.

        Raises:
            UsageError: a field, or a field's value, is not supported; the message names it.
        """
        values = config_values(cls, fields, UNSUPPORTED_DEFAULTS, "UNet2DConditionModel")
        config = cls(**values)
        config.validate()
        return config

    def validate(self) -> None:
        """Check the fields against each other.

        Raises:
            UsageError: lengths disagree or a block type is unknown; the message names the field.
        """
        n = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != n:
                raise UsageError(
                    f"UNet config: {name} has {len(getattr(self, name))} entries, "
                    f"block_out_channels has {n}"
                )
        for name, known, given in (
            ("down_block_types", DOWN_BLOCKS, self.down_block_types),
            ("up_block_types", UP_BLOCKS, self.up_block_types),
            ("mid_block_type", MID_BLOCKS, (self.mid_block_type,)),
        ):
            for block in given:
                if block not in known:
                    raise UsageError(
                        f"UNet config: {name} {block!r} is not supported; expected one of {known}"
                    )
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise UsageError(
                f"UNet config: resnet_time_scale_shift={self.resnet_time_scale_shift!r} is not "
                "supported; expected 'default' or 'scale_shift'"
            )
        for name in ("transformer_layers_per_block", "attention_head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n:
                raise UsageError(
                    f"UNet config: {name} has {len(value)} entries, block_out_channels has {n}"
                )

    def per_block(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """Spread a field that may be one number over the blocks."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads per block.

        Diffusers' `attention_head_dim` is, for historical reasons, their number.
        """
        return self.per_block(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer layers per block."""
        return self.per_block(self.transformer_layers_per_block)


# Fields of Diffusers' class that change the network and are not implemented: only these values are
# accepted.
UNSUPPORTED_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "only_cross_attention": (False,),
    "num_attention_heads": (None,),
    "mid_block_scale_factor": (1, 1.0),
    "dropout": (0, 0.0),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "addition_embed_type_num_heads": (64,),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "reverse_transformer_layers_per_block": (None,),
}


def config_values(
    cls: type, fields: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]], model: str
) -> dict[str, Any]:
    """Pick the fields of a config dataclass out of a checkpoint's JSON.

    What is not implemented is refused.

    Args:
        cls: the frozen dataclass to fill.
        fields: the JSON object.
        unsupported: fields that are known but not implemented, with the values under which they do
            nothing.
        model: the model's class name, for messages.

    Raises:
        UsageError: an unknown field, or an unsupported value.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key.startswith("_"):
            continue
        if key in names:
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in unsupported:
            if value not in unsupported[key]:
                raise UsageError(
                    f"{model} config: {key}={value!r} is not supported; only "
                    f"{unsupported[key][0]!r} is"
                )
        else:
            hint = suggest(key, sorted(names | set(unsupported)))
            raise UsageError(
                f"{model} config: unknown field {key!r}{hint}; "
                "is this config written by a newer Diffusers?"
            )
    return values
