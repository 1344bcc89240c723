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
CLASS_EMBEDDINGS = (None, "timestep", "identity", "projection", "simple_projection")
ADDITION_EMBEDDINGS = (None, "text_time")

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of `UNet2DConditionModel` that are implemented, with Diffusers' defaults."""

    sample_size: int | tuple[int, int] | None = None
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
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: Ints = (320, 640, 1280, 1280)
    layers_per_block: int | Ints = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | Ints = 1280
    transformer_layers_per_block: int | tuple[int | Ints, ...] = 1
    reverse_transformer_layers_per_block: tuple[int | Ints, ...] | None = None
    attention_head_dim: int | Ints = 8
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    class_embeddings_concat: bool = False

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
            UsageError: lengths disagree, a value is unknown, or a field that another one needs is
                missing; the message names the field.
        """
        n = len(self.block_out_channels)
        for name in _PER_BLOCK:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n:
                raise UsageError(
                    f"UNet config: {name} has {len(value)} entries, block_out_channels has {n}"
                )
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            for given in value if isinstance(value, tuple) else (value,):
                if given not in known:
                    raise UsageError(
                        f"UNet config: {name} {given!r} is not supported; expected one of {known}"
                    )
        for i in range(n):
            _check_depths("transformer_layers_per_block", self.depths(i), self.layers[i])
            _check_depths(self._up_depths_field, self.up_depths(i), self.layers[n - 1 - i] + 1)
        for name, needed_by in self._needed().items():
            if needed_by and getattr(self, name) is None:
                raise UsageError(f"UNet config: {needed_by} needs {name}, which is not given")
        if self.class_embeddings_concat and not self.has_class_embedding:
            raise UsageError("UNet config: class_embeddings_concat needs class_embed_type")

    def _needed(self) -> dict[str, str | None]:
        """Return each field that some value of another makes necessary, with that value."""
        projected = self.class_embed_type in ("projection", "simple_projection")
        timed = self.addition_embed_type == "text_time"
        added = f"addition_embed_type={self.addition_embed_type!r}" if timed else None
        embedded = f"class_embed_type={self.class_embed_type!r}" if projected else None
        return {
            "projection_class_embeddings_input_dim": added or embedded,
            "addition_time_embed_dim": added,
        }

    def per_block(self, name: str) -> tuple[Any, ...]:
        """Return a field that may be one value as one a block, on the way down."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def layers(self) -> Ints:
        """Residual blocks of each block on the way down; one more on the way up."""
        return self.per_block("layers_per_block")

    @property
    def heads(self) -> Ints:
        """Heads per block.

        Diffusers' `attention_head_dim` is, for historical reasons, their number.
        """
        return self.per_block("attention_head_dim")

    @property
    def has_class_embedding(self) -> bool:
        """Whether the network is given class labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def time_embed_dim(self) -> int:
        """The width of the timestep's embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def depths(self, index: int) -> Ints:
        """Transformer layers of each spatial transformer in block `index` of the way down."""
        value = self.per_block("transformer_layers_per_block")[index]
        return value if isinstance(value, tuple) else (value,) * self.layers[index]

    def up_depths(self, index: int) -> Ints:
        """The same for block `index` of the way up (0 is the lowest resolution)."""
        given = self.reverse_transformer_layers_per_block
        if given is None:
            given = self.per_block("transformer_layers_per_block")[::-1]
        value = given[index]
        layers = self.layers[::-1][index] + 1
        return value if isinstance(value, tuple) else (value,) * layers

    @property
    def _up_depths_field(self) -> str:
        given = self.reverse_transformer_layers_per_block is not None
        return f"{'reverse_' if given else ''}transformer_layers_per_block"


# fields with one entry a block, if they are lists
_PER_BLOCK = (
    "down_block_types",
    "up_block_types",
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "attention_head_dim",
)

_CHOICES: dict[str, tuple[Any, ...]] = {
    "down_block_types": DOWN_BLOCKS,
    "up_block_types": UP_BLOCKS,
    "mid_block_type": MID_BLOCKS,
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": CLASS_EMBEDDINGS,
    "addition_embed_type": ADDITION_EMBEDDINGS,
}

# Fields of Diffusers' class that change the network and are not implemented, or that do nothing in
# the blocks that are: only these values are accepted.
UNSUPPORTED_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (None,),
    "dropout": (0, 0.0),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type_num_heads": (64,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}


def _check_depths(name: str, depths: Ints, layers: int) -> None:
    if len(depths) != layers:
        raise UsageError(
            f"UNet config: {name} has an entry {list(depths)} for a block with {layers} spatial "
            "transformers; expected one number, or one a transformer (an asymmetric UNet has "
            "reverse_transformer_layers_per_block too)"
        )


def _frozen(value: Any) -> Any:
    """Return JSON lists as tuples, all the way down."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


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
            values[key] = _frozen(value)
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
