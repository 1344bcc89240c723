"""Named checkpoint tensors ⇄ NNX modules, strict in both directions.

`LAYOUT` is the one table from checkpoint tensors to module parameters: for each kind of layer, the
tensor's suffix, the parameter's name and the two transposes. A module's path is its name in the
checkpoint, so nothing else is needed; the few historical names are in `RENAMES`. A tensor that is
missing, left over, or of the wrong shape is an error that names it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip import CLIPTextModel
from diffusion_grpo.models.vae import AutoencoderKL
from diffusion_grpo.tensor_files import Entry, Tensors, as_entries

Axes = tuple[int, ...]
NodePath = tuple[Any, ...]  # attribute names and list positions, as NNX gives them

# kind of layer → (tensor suffix, parameter, axes that bring the tensor to the parameter's layout)
LAYOUT: tuple[tuple[type, tuple[tuple[str, str, Axes | None], ...]], ...] = (
    (nnx.Conv, (("weight", "kernel", (2, 3, 1, 0)), ("bias", "bias", None))),  # OIHW → HWIO
    (nnx.Linear, (("weight", "kernel", (1, 0)), ("bias", "bias", None))),  # [out, in] → [in, out]
    (nnx.LayerNorm, (("weight", "scale", None), ("bias", "bias", None))),
    (nnx.GroupNorm, (("weight", "scale", None), ("bias", "bias", None))),
    (nnx.Embed, (("weight", "embedding", None),)),
)

# historical names → today's. Stable Diffusion 1.x's VAE predates Diffusers' attention names;
# Transformers before 5 puts everything of a text encoder under `text_model.`.
RENAMES: dict[type, tuple[tuple[str, str], ...]] = {
    AutoencoderKL: (
        (r"\.attentions\.(\d+)\.query\.", r".attentions.\1.to_q."),
        (r"\.attentions\.(\d+)\.key\.", r".attentions.\1.to_k."),
        (r"\.attentions\.(\d+)\.value\.", r".attentions.\1.to_v."),
        (r"\.attentions\.(\d+)\.proj_attn\.", r".attentions.\1.to_out.0."),
    ),
    CLIPTextModel: ((r"^text_model\.", ""),),
}

# tensors that carry no parameter: index buffers of older Transformers
BUFFERS = re.compile(r"(^|\.)embeddings\.position_ids$")

# what `save_pretrained` puts before a class's tensor names, so that every Transformers version
# reads them
PREFIXES: dict[type, str] = {CLIPTextModel: "text_model."}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lives in a module."""

    path: NodePath
    axes: Axes | None

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """Bring a checkpoint tensor to the parameter's layout."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the checkpoint tensor's shape, given the parameter's."""
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))

    def to_tensor(self, parameter: np.ndarray) -> np.ndarray:
        """Bring a parameter to the checkpoint tensor's layout."""
        if self.axes is None:
            return parameter
        return np.ascontiguousarray(parameter.transpose(np.argsort(self.axes)))


def checkpoint_slots(module: nnx.Module) -> dict[str, Slot]:
    """Map every checkpoint tensor name of a module to its parameter.

    Args:
        module: any of this package's models; may be abstract (`nnx.eval_shape`).

    Returns:
        Tensor name → slot, for all parameters but adapters'.
    """
    slots: dict[str, Slot] = {}
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Module):
            continue
        layout = next((rows for kind, rows in LAYOUT if isinstance(node, kind)), None)
        prefix = "".join(f"{p}." for p in path)
        if layout is not None:
            for suffix, name, axes in layout:
                if getattr(node, name, None) is not None:
                    slots[prefix + suffix] = Slot((*path, name), axes)
        else:
            for name, value in vars(node).items():
                if type(value) is nnx.Param:
                    slots[prefix + name] = Slot((*path, name), None)
    return slots


class OneKey(nnx.Rngs):
    """Give every initializer the same key, for modules of which only the shapes are wanted.

    Counting keys while a module is traced takes time quadratic in its parameters: a minute for
    SDXL's UNet.
    """

    def __init__(self) -> None:
        """Make the key."""
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        """Return it."""
        return self._key


def abstract_module(module_class: Any, config: Any, **kw: Any) -> Any:
    """Build a module without parameters: each is a `jax.ShapeDtypeStruct`.

    Args:
        module_class: a model class, called as `module_class(config, rngs=…, **kw)`.
        config: its configuration.
        **kw: `dtype`, `param_dtype`.
    """
    rngs = OneKey()
    return nnx.eval_shape(lambda: module_class(config, rngs=rngs, **kw))


def load_tensors(
    module_class: Any,
    config: Any,
    tensors: Mapping[str, np.ndarray],
    *,
    source: str,
    on_host: bool = False,
    **kw: Any,
) -> Any:
    """Build a module and fill it from named tensors, one at a time.

    Nothing is initialized and then thrown away, and no tensor is held twice.

    Args:
        module_class: a model class, called as `module_class(config, rngs=…, **kw)`.
        config: its configuration.
        tensors: checkpoint tensors by name.
        source: where they come from, for messages.
        on_host: leave the parameters in the host's memory, as NumPy arrays: for a network that is
            on the device only while it is used.
        **kw: `dtype`, `param_dtype`.

    Raises:
        UsageError: a tensor is missing, left over or misshapen; the message names it.
    """
    module = abstract_module(module_class, config, **kw)
    slots = checkpoint_slots(module)
    named = {current_name(module_class, name): name for name in tensors if not BUFFERS.search(name)}
    missing = sorted(slots.keys() - named.keys())
    extra = sorted(named[n] for n in named.keys() - slots.keys())
    if missing or extra:
        raise UsageError(_mismatch(module_class.__name__, source, missing, extra))
    graphdef, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    entries = as_entries(tensors)
    for name, slot in slots.items():
        given, expected = entries[named[name]].shape, flat[slot.path].shape
        if given != (shape := slot.tensor_shape(expected)):
            raise UsageError(
                f"{source}: tensor {named[name]!r} has shape {given}, but "
                f"{module_class.__name__} with this config.json expects {shape}; the weights and "
                "the config do not belong together"
            )
    dtype = np.dtype(kw.get("param_dtype", jnp.float32))
    for name, slot in slots.items():
        # Converted on the host, one at a time: the device never holds two copies of anything.
        value = slot.to_parameter(entries[named[name]].read()).astype(dtype, copy=False)
        value = np.ascontiguousarray(value) if on_host else jnp.asarray(value)
        flat[slot.path] = flat[slot.path].replace(value)
    unfilled = [p for p, v in flat.items() if isinstance(v.get_value(), jax.ShapeDtypeStruct)]
    if unfilled:
        raise AssertionError(f"parameters of {module_class.__name__} without a tensor: {unfilled}")
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def current_name(module_class: Any, name: str) -> str:
    """Return today's name of a checkpoint tensor, within the module."""
    for pattern, replacement in RENAMES.get(module_class, ()):
        name = re.sub(pattern, replacement, name)
    return name


def _mismatch(model: str, source: str, missing: list[str], extra: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(repr(n) for n in names[:5]) + (
            f" and {len(names) - 5} more" if len(names) > 5 else ""
        )

    parts = []
    if missing:
        parts.append(f"missing tensor{'s' * (len(missing) > 1)} {some(missing)}")
    if extra:
        parts.append(f"unexpected tensor{'s' * (len(extra) > 1)} {some(extra)}")
    return (
        f"{source}: {' and '.join(parts)} for {model} with this config.json; "
        "the weights and the config do not belong together, or the file is damaged"
    )


def module_tensors(module: nnx.Module, *, dtype: Any | None = None) -> Tensors:
    """Name and lay out a module's parameters as its checkpoint has them.

    Args:
        module: one of this package's models.
        dtype: the dtype to write floating-point tensors in (default: as they are).

    Returns:
        Tensors that come from the device when they are asked for.
    """
    prefix = PREFIXES.get(type(module), "")
    flat = dict(nnx.to_flat_state(nnx.state(module)))

    def entry(slot: Slot) -> Entry:
        value = flat[slot.path].get_value()
        shape = slot.tensor_shape(value.shape)
        return Entry(shape, np.dtype(value.dtype), lambda: slot.to_tensor(np.asarray(value)))

    slots = checkpoint_slots(module).items()
    return Tensors({prefix + name: entry(slot) for name, slot in slots}).cast(dtype)
