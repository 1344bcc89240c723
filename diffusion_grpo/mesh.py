"""Devices: a mesh of `data` by `fsdp`, and what is laid out over it how.

Images are divided over both axes, whole groups to a shard; parameters are replicated, or divided
over `fsdp` along their largest axis that it divides, optimizer state with them. `use` makes a mesh
the context's; everything else here reads it from there, and does nothing without one, or on a
single device. Communication is left to GSPMD. Arrays are those of all processes: what one of them
wants to see of them, it takes with `own_rows` or `to_host`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_grpo import processes
from diffusion_grpo.config import Config
from diffusion_grpo.consistency import images_learned_from
from diffusion_grpo.errors import UsageError
from diffusion_grpo.sections import MeshConfig

AXES = ("data", "fsdp")
Place = Callable[[Any], Any]


def make_mesh(config: Config) -> Mesh:
    """Return the mesh of a run.

    Several processes have the devices side by side, so that each has consecutive images.

    Raises:
        UsageError: the axes do not fit the devices, or the images do not divide over them; with
            several processes, devices are left out, or they have different numbers of them.
    """
    options, devices = config.mesh, _devices()
    data, size = _sizes(options, len(devices))
    have = f"there {'is 1 device' if len(devices) == 1 else f'are {len(devices)} devices'}"
    if not size or size > len(devices):
        raise UsageError(
            f"mesh.data {options.data} x mesh.fsdp {options.fsdp} asks for "
            f"{max(size, options.fsdp)} devices, but {have}; expected a product of at most "
            f"{len(devices)}"
        )
    if processes.count() > 1:
        _check_processes(devices, size)
    check_divides(config, size)
    return _side_by_side(devices[:size], data, options.fsdp)


def make_mesh_at_hand(config: Config) -> Mesh:
    """Return the mesh of what reads a run's state and draws no image.

    It is the run's own where there are devices enough, whether or not images divide over them, and
    else a single device.
    """
    options, devices = config.mesh, _devices()
    data, size = _sizes(options, len(devices))
    if not 0 < size <= len(devices):
        return _side_by_side(devices[:1], 1, 1)
    return _side_by_side(devices[:size], data, options.fsdp)


def _devices() -> list[Any]:
    """Return the devices of all processes, those of each process side by side."""
    return sorted(jax.devices(), key=lambda device: device.process_index)


def _sizes(options: MeshConfig, count: int) -> tuple[int, int]:
    """Return the length of the `data` axis with `count` devices, and how many devices that takes.

    Both are 0 where the devices do not suffice for `fsdp`, and `data` is left open.
    """
    data = count // options.fsdp if options.data is None else options.data
    return data, data * options.fsdp


def _side_by_side(devices: Sequence[Any], data: int, fsdp: int) -> Mesh:
    return Mesh(np.asarray(devices).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def _check_processes(devices: Sequence[Any], size: int) -> None:
    """Raise a `UsageError` unless all processes have as many devices, and all devices are used."""
    each = Counter(device.process_index for device in devices)
    if len(set(each.values())) > 1:
        listed = ", ".join(f"{number} in process {index}" for index, number in each.items())
        raise UsageError(
            f"the processes have different numbers of devices: {listed}; expected as many in each, "
            "so that each has as many images"
        )
    if size < len(devices):
        raise UsageError(
            f"the mesh has {size} devices, but the {len(each)} processes have {len(devices)}; "
            "expected all of them, since each process has images of its own: leave --mesh.data "
            "out, or start fewer processes"
        )


def check_divides(config: Config, size: int) -> None:
    """Raise a `UsageError` unless every shard gets whole groups and equal parts."""
    rollout = config.rollout
    numbers = {
        "rollout.prompts_per_iteration": rollout.prompts_per_iteration,
        "rollout.microbatch": rollout.microbatch,
        "grpo.microbatch": config.grpo.microbatch,
        "the number of images learned from": images_learned_from(rollout, config.grpo),
    }
    for name, value in numbers.items():
        if value is not None and value % size:
            raise UsageError(
                f"{name} is {value}, which does not divide over {size} devices; expected a "
                f"multiple of {size}, so that each has whole groups and as many images, or fewer "
                f"devices: --mesh.data {math.gcd(*filter(None, numbers.values()))} --mesh.fsdp 1"
            )


def one_device() -> Mesh:
    """Return a mesh of a single device of this process."""
    return _side_by_side(jax.local_devices()[:1], 1, 1)


def use(mesh: Mesh) -> AbstractContextManager[Any]:
    """Return a context in which computations run on a mesh."""
    return jax.set_mesh(mesh)


def own_mesh() -> Mesh:
    """Return a mesh of this process's devices alone."""
    devices = np.asarray(jax.local_devices()).reshape(-1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def alone() -> AbstractContextManager[Any]:
    """Return a context in which computations run on the devices of this process only.

    What a process does by itself, such as rewards of its own images, would otherwise wait for the
    others. In a single process nothing changes.
    """
    return jax.set_mesh(own_mesh()) if processes.count() > 1 else nullcontext()


def own_rows(x: Any) -> Any:
    """Return those of an array's rows that are on this process's devices, where they are.

    Args:
        x: divided over all devices along its first axis, as by `by_rows`.

    Returns:
        `[B / processes, ...]`, for computations within `alone`; the array itself in a single
        process.
    """
    if processes.count() == 1:
        return x
    mesh = own_mesh()
    data = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        (x.shape[0] // processes.count(), *x.shape[1:]),
        NamedSharding(mesh, PartitionSpec(AXES)),
        [data[device] for device in mesh.devices.flat],
    )


def of_all_processes(x: Any) -> Any:
    """Return an array that every process has the whole of as one array of all their devices."""
    if processes.count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return x
    return replicated(jnp.asarray(x))


def on_devices(tree: Any) -> Any:
    """Put arrays of the host's memory on the devices; others are there."""
    if processes.count() == 1:
        return jax.device_put(tree)
    return jax.tree.map(of_all_processes, tree)


def resident() -> AbstractContextManager[Any]:
    """Refuse, inside, to bring to the devices what a compiled program is given from the host.

    The programs that an iteration repeats are called so: latents, images or weights that came from
    the host would be sent again at each call, and nobody would notice but by the time it takes.
    """
    return jax.transfer_guard_host_to_device("disallow")


def to_host(x: Any, *, keep: bool = True) -> Any:
    """Return the whole of a tree's arrays as NumPy, one at a time on the devices.

    Args:
        x: arrays, however they are divided; all processes have to ask.
        keep: without it, take part and return None in their place.
    """

    def fetched(leaf: Any) -> np.ndarray | None:
        whole = replicated(leaf)
        return np.asarray(whole) if keep else None

    return jax.device_get(x) if processes.count() == 1 else jax.tree.map(fetched, x)


def shards() -> int:
    """Return over how many devices images are divided: 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in AXES)


def _fsdp() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["fsdp"]


def parameter_spec(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """Return how a parameter is divided over `fsdp` of `size` devices.

    Along its largest axis that `size` divides, the last of several as large; one without such an
    axis is replicated.
    """
    axes = [axis for axis, length in enumerate(shape) if length and length % size == 0]
    if size == 1 or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(("fsdp" if axis == largest else None) for axis in range(largest + 1)))


def divided(tree: Any) -> Any:
    """Lay parameters, or optimizer state of the same shapes, out by `parameter_spec`."""
    if (size := _fsdp()) == 1:
        return replicated(tree)
    return jax.tree.map(lambda x: _constrain(x, parameter_spec(x.shape, size)), tree)


def replicated(tree: Any) -> Any:
    """Give every device the whole of each array."""
    if shards() == 1:
        return tree
    return jax.tree.map(lambda x: _constrain(x, PartitionSpec()), tree)


def gathered(tree: Any) -> Any:
    """Gather divided parameters where a network uses them, so that no activation is moved."""
    return tree if _fsdp() == 1 else replicated(tree)


def by_rows(tree: Any, axis: int = 0) -> Any:
    """Divide arrays over all devices along an axis of images."""
    if shards() == 1:
        return tree
    spec = PartitionSpec(*(None,) * axis, AXES)
    return jax.tree.map(lambda x: _constrain(x, spec), tree)


def _constrain(x: Any, spec: PartitionSpec) -> Any:
    """Constrain a traced array; lay out a concrete one, by a compiled copy."""
    if isinstance(x, Tracer):
        return jax.lax.with_sharding_constraint(x, spec)
    return _laid_out(spec)(x)


_PROGRAMS: dict[PartitionSpec, Any] = {}


def _laid_out(spec: PartitionSpec) -> Any:
    if spec not in _PROGRAMS:
        _PROGRAMS[spec] = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, spec))
    return _PROGRAMS[spec]


def place_module(module: nnx.Module, place: Place) -> None:
    """Lay a network's parameters out, in place."""
    if shards() > 1:
        nnx.update(module, place(nnx.state(module)))


def placement(*, full: bool) -> Place:
    """Return how trained parameters are laid out: all of a network, or the small ones of LoRA."""
    return divided if full else replicated


def take_rows(x: Any, rows: Any, axis: int = 0) -> Any:
    """Return some images of an array whose images are divided over the devices.

    No image leaves its device: a slice of m images takes m/n of each of the n shards, and places
    `[m]` have to name as many of each.

    Args:
        x: images along `axis`.
        rows: a slice or places.
        axis: of the images.
    """
    count = shards()
    if count == 1:
        return x[(slice(None),) * axis + (rows,)]
    if isinstance(rows, slice):
        return _slice_rows(x, rows.start // count, (rows.stop - rows.start) // count, axis, count)
    places = np.asarray(rows).reshape(count, -1)
    places = places - np.arange(count)[:, None] * (x.shape[axis] // count)
    return _pick_rows(x, jnp.asarray(places), axis, count)


def own_places(count: int) -> slice:
    """Return which of `count` images, divided over all devices, are this process's."""
    each = count // processes.count()
    return slice(processes.rank() * each, (processes.rank() + 1) * each)


def shard_order(count: int, size: int) -> np.ndarray:
    """Return the places of a process's images in the order in which slices of `size` take them.

    Args:
        count: images of all processes.
        size: of a slice.

    Returns:
        Places among the process's own images, which in a single process are all.
    """
    number = shards() // processes.count()
    count, size = count // processes.count(), size // processes.count()
    each = np.arange(count).reshape(number, -1, size // number)
    return each.swapaxes(0, 1).reshape(-1)


def join_rows(parts: Sequence[Any], axis: int = 0) -> Any:
    """Put slices of `take_rows` back together; each image stays on its device."""
    return _join_rows(list(parts), axis, shards())


def partial_sums(tree: Any) -> Any:
    """Return zeros like each array for every shard to sum up what is its own, `[n, ...]`."""
    return _zeros(tree, shards())


def total_of(sums: Any) -> Any:
    """Sum up `partial_sums` over the shards, each of which gets the total."""
    return _total_of(sums)


def split_rows(tree: Any, axes: Any) -> Any:
    """Split each array into shards, `[n, B/n]`, along the axis of its images; None has none."""
    leaves, structure = jax.tree.flatten(tree)
    along = structure.flatten_up_to(axes)
    return structure.unflatten(
        [
            x if axis is None else _split(x, axis, shards())
            for x, axis in zip(leaves, along, strict=True)
        ]
    )


@partial(jax.jit, static_argnums=1)
def _zeros(tree: Any, count: int) -> Any:
    return by_rows(jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), tree))


@partial(jax.jit, donate_argnums=0)
def _total_of(sums: Any) -> Any:
    return replicated(jax.tree.map(lambda x: x.sum(axis=0), sums))


@partial(jax.jit, static_argnames=("each", "axis", "count"))
def _slice_rows(x: Any, start: Any, each: int, axis: int, count: int) -> Any:
    split = _split(x, axis, count)
    part = jax.lax.dynamic_slice_in_dim(split, start, each, axis + 1)
    return _merge(part, axis)


@partial(jax.jit, static_argnames=("axis", "count"))
def _pick_rows(x: Any, places: Any, axis: int, count: int) -> Any:
    split = jnp.moveaxis(_split(x, axis, count), axis, 0)
    picked = jax.vmap(lambda part, rows: jnp.take(part, rows, axis=axis))(split, by_rows(places))
    return _merge(jnp.moveaxis(picked, 0, axis), axis)


@partial(jax.jit, static_argnames=("axis", "count"))
def _join_rows(parts: list[Any], axis: int, count: int) -> Any:
    joined = jnp.concatenate([_split(part, axis, count) for part in parts], axis=axis + 1)
    return _merge(joined, axis)


def _split(x: Any, axis: int, count: int) -> Any:
    shape = x.shape
    return by_rows(x.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :]), axis)


def _merge(x: Any, axis: int) -> Any:
    shape = x.shape
    merged = x.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    return by_rows(merged, axis)
