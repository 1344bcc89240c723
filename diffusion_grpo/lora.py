"""Low-rank adapters on linear layers and convolutions: W x + (α/r) B A x (Hu et al. 2021, eq. 3).

An adapted layer keeps its class's parameters at their paths and gains, for each adapter, two of
type `LoRAParam`, so that the checkpoint table reads it as before and a filter on the type splits
the adapters from the rest. With B = 0 the layer is exactly the original one: the reference model
costs no second UNet. Of a convolution, A has the layer's kernel, stride and padding, and B is 1×1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.models.convolutions import rows_dot

DEFAULT = "default"  # the name of an adapter that is given none


class LoRAParam(nnx.Param):
    """A parameter of an adapter; float32 whatever the layer's, for small updates are lost else."""


class Factors(NamedTuple):
    """An adapter of one layer, outside the layer; arrays in the layer's own layout.

    Attributes:
        a: `[in, r]`, or `[kh, kw, in, r]` of a convolution.
        b: `[r, out]`, or `[1, 1, r, out]`.
        scale: α/r.
    """

    a: Any
    b: Any
    scale: float


class Adapter(nnx.Module):
    """A and B of one adapter in one layer."""

    def __init__(self, factors: Factors):
        """Wrap the factors, in float32."""
        self.lora_a = LoRAParam(jnp.asarray(factors.a, jnp.float32))
        self.lora_b = LoRAParam(jnp.asarray(factors.b, jnp.float32))
        self.scale = float(factors.scale)

    @property
    def factors(self) -> Factors:
        """A, B and α/r."""
        return Factors(self.lora_a[...], self.lora_b[...], self.scale)


class LoRALinear(nnx.Linear):
    """A linear layer with low-rank adapters, by name."""

    adapters: Any

    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:  # type: ignore[override]
        """Map [..., in] to [..., out]."""
        out = super().__call__(inputs)
        x = inputs.astype(out.dtype)
        for adapter in self.adapters.values():
            a, b, scale = adapter.factors
            low = rows_dot(x, a.astype(out.dtype))
            out = out + rows_dot(low, b.astype(out.dtype)) * scale
        return out


class LoRAConv(nnx.Conv):
    """A convolution with low-rank adapters, by name."""

    adapters: Any

    def __call__(self, inputs: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:  # type: ignore[override]
        """Map [B, h, w, in] to [B, h', w', out]."""
        out = super().__call__(inputs)
        x = inputs.astype(out.dtype)
        for adapter in self.adapters.values():
            a, b, scale = adapter.factors
            low = jax.lax.conv_general_dilated(
                x,
                a.astype(out.dtype),
                _pair(self.strides),
                self.padding,  # type: ignore[arg-type]
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            out = out + rows_dot(low, b[0, 0].astype(out.dtype)) * scale
        return out


def _pair(strides: Any) -> tuple[int, int]:
    return (strides, strides) if isinstance(strides, int) else tuple(strides)


_ADAPTED: dict[type, type] = {nnx.Linear: LoRALinear, nnx.Conv: LoRAConv}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}


def layers(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield the dotted path and the layer of everything that can have an adapter, or has one."""
    for path, node in nnx.iter_graph(module):
        if type(node) in _ADAPTED or type(node) in _PLAIN:
            yield ".".join(map(str, path)), node  # type: ignore[misc]


def attach_lora(
    module: nnx.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    rngs: nnx.Rngs,
    name: str = DEFAULT,
) -> list[str]:
    r"""Give an adapter to every layer whose path ends in a match of one of the patterns.

    Args:
        module: changed in place; the layers' parameters are shared, not copied.
        targets: regular expressions on the dotted paths of linear layers and convolutions, such as
            `to_q`, `to_out\.0` or `resnets\.\d+\.conv1`.
        rank: r of the adapter in every layer.
        alpha: α; the adapter's output is scaled by α/r.
        rngs: draws A ~ N(0, 1/r²); B starts at 0, so that nothing changes at first.
        name: of the adapter; a layer may have several.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        UsageError: a pattern matches no layer, or a layer has an adapter of that name.
    """
    patterns = {target: re.compile(rf"(^|\.)(?:{target})$") for target in targets}
    found = dict.fromkeys(targets, 0)
    chosen: dict[str, Factors] = {}
    available = list(layers(module))
    for path, layer in available:
        matching = [target for target, pattern in patterns.items() if pattern.search(path)]
        for target in matching:
            found[target] += 1
        if matching:
            *window, inputs, outputs = layer.kernel.shape  # type: ignore[attr-defined]
            shape = (*window, inputs, rank)
            a = jax.random.normal(rngs.params(), shape, jnp.float32) / rank
            b = jnp.zeros((*(1 for _ in window), rank, outputs), jnp.float32)
            chosen[path] = Factors(a, b, alpha / rank)
    for target, count in found.items():
        if not count:
            ends = sorted({path.rpartition(".")[2] for path, _ in available} - set("0123456789"))
            raise UsageError(
                f"lora_targets: {target!r} matches no linear layer or convolution of "
                f"{type(module).__name__}{suggest(target, ends)}; their paths end in "
                f"{', '.join(ends)}, to_out.0, …"
            )
    insert_lora(module, chosen, name=name)
    return list(chosen)


def insert_lora(module: nnx.Module, factors: Mapping[str, Factors], *, name: str = DEFAULT) -> None:
    """Give layers adapters with known factors, in place.

    Args:
        module: the network.
        factors: dotted path → factors.
        name: of the adapter.

    Raises:
        UsageError: a path is no linear layer or convolution, the shapes are not the layer's, or it
            has an adapter of that name.
    """
    known = dict(layers(module))
    for path, given in factors.items():
        if path not in known:
            raise UsageError(
                f"LoRA for {path!r}: {type(module).__name__} has no linear layer or convolution of "
                f"that path{suggest(path, known)}"
            )
        layer: Any = known[path]
        *window, inputs, outputs = layer.kernel.shape
        rank = given.a.shape[-1]
        shapes = ((*window, inputs, rank), (*(1 for _ in window), rank, outputs))
        if (given.a.shape, given.b.shape) != shapes:
            raise UsageError(
                f"LoRA for {path!r} has factors of shapes {given.a.shape} and {given.b.shape}; "
                f"the layer expects {shapes[0]} and {shapes[1]}"
            )
        if type(layer) in _ADAPTED:
            layer = _retyped(layer, _ADAPTED[type(layer)])
            layer.adapters = nnx.Dict({})
            _replace(module, path, layer)
        elif name in layer.adapters:
            raise UsageError(f"LoRA for {path!r}: the layer has an adapter named {name!r} already")
        layer.adapters[name] = Adapter(given)


def lora_factors(module: nnx.Module, name: str = DEFAULT) -> dict[str, Factors]:
    """Return the factors of an adapter by the dotted paths of the layers that have it."""
    return {
        path: layer.adapters[name].factors
        for path, layer in _adapted(module)
        if name in layer.adapters
    }


def lora_names(module: nnx.Module) -> list[str]:
    """Return the names of the adapters in a module, in the order they were attached."""
    return list(dict.fromkeys(name for _, layer in _adapted(module) for name in layer.adapters))


def weight_lora(module: nnx.Module, weights: Mapping[str, float]) -> None:
    """Multiply the scales of adapters, in place: how several are mixed for sampling.

    Args:
        module: the network.
        weights: name → factor on its α/r.

    Raises:
        UsageError: no adapter of that name.
    """
    _check_names(module, weights)
    for _, layer in _adapted(module):
        for name, weight in weights.items():
            if name in layer.adapters:
                layer.adapters[name].scale *= weight


def remove_lora(
    module: nnx.Module, names: Collection[str] | None = None
) -> dict[str, dict[str, Factors]]:
    """Take adapters out of a module, in place.

    Args:
        module: the network.
        names: which; None takes all.

    Returns:
        name → path → factors, as `insert_lora` takes them.

    Raises:
        UsageError: no adapter of that name.
    """
    chosen = lora_names(module) if names is None else list(names)
    _check_names(module, chosen)
    removed = {name: lora_factors(module, name) for name in chosen}
    for path, layer in _adapted(module):
        for name in chosen:
            layer.adapters.pop(name, None)
        if not layer.adapters:
            plain = _retyped(layer, _PLAIN[type(layer)])
            del plain.adapters
            _replace(module, path, plain)
    return removed


def merge_lora(
    module: nnx.Module, names: Collection[str] | None = None, *, dtype: Any | None = None
) -> dict[str, dict[str, Factors]]:
    """Add adapters into the kernels, W + (α/r) B A in float32, and take them out; in place.

    A kernel in bfloat16 has 8 bits: of an adapter that changes it by a thousandth, four fifths
    are rounded away.

    Args:
        module: the network.
        names: which; None merges all.
        dtype: of the changed kernels; None keeps theirs.

    Returns:
        What `unmerge_lora` needs to undo it.

    Raises:
        UsageError: no adapter of that name.
    """
    removed = remove_lora(module, names)
    _add(module, removed, 1.0, dtype)
    return removed


def unmerge_lora(module: nnx.Module, merged: Mapping[str, Mapping[str, Factors]]) -> None:
    """Subtract adapters from the kernels and attach them again, in place.

    Args:
        module: the network.
        merged: what `merge_lora` returned. The kernels come back but for rounding in their dtype.
    """
    _add(module, merged, -1.0)
    for name, factors in merged.items():
        insert_lora(module, factors, name=name)


def delta(factors: Factors) -> Float[Array, "*window i o"]:
    """Return (α/r) A B, what an adapter adds to the kernel of its layer, in float32."""
    a, b = (jnp.asarray(part, jnp.float32) for part in (factors.a, factors.b))
    # Not in an accelerator's faster products of fewer bits: this is written into kernels.
    product = jnp.matmul(a, b[0, 0] if b.ndim == 4 else b, precision="highest")
    return factors.scale * product


def _add(
    module: nnx.Module,
    adapters: Mapping[str, Mapping[str, Factors]],
    sign: float,
    dtype: Any | None = None,
) -> None:
    known: dict[str, Any] = dict(layers(module))
    for factors in adapters.values():
        for path, given in factors.items():
            kernel = known[path].kernel[...]
            new = kernel.astype(jnp.float32) + sign * delta(given)
            # A new variable: the kernel may be shared with a module that is not merged.
            known[path].kernel = nnx.Param(new.astype(kernel.dtype if dtype is None else dtype))


def _adapted(module: nnx.Module) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in layers(module) if type(layer) in _PLAIN]


def _check_names(module: nnx.Module, names: Collection[str]) -> None:
    present = lora_names(module)
    for name in names:
        if name not in present:
            raise UsageError(
                f"{type(module).__name__} has no adapter {name!r}{suggest(name, present)}; it has "
                f"{', '.join(present) or 'none'}"
            )


def _retyped(layer: Any, kind: type) -> Any:
    """Return a layer of another class with the same attributes; its parameters are shared."""
    size: tuple[Any, ...] = (1, 1, (1, 1)) if issubclass(kind, nnx.Conv) else (1, 1)
    new = nnx.eval_shape(lambda: kind(*size, rngs=nnx.Rngs(0)))
    for key, value in vars(layer).items():
        if not key.startswith("_pytree"):
            setattr(new, key, value)
    return new


def _replace(module: nnx.Module, path: str, layer: nnx.Module) -> None:
    *parents, last = path.split(".")
    owner: Any = module
    for key in parents:
        owner = owner[int(key)] if isinstance(owner, nnx.List) else getattr(owner, key)
    if isinstance(owner, nnx.List):
        owner[int(last)] = layer
    else:
        setattr(owner, last, layer)
