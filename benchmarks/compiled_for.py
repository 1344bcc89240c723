"""What an accelerator that is not here would run: its compiled programs, and their memory.

    pip install "jax[cuda12]"                            # or jax[tpu]; the device is not needed
    python benchmarks/compiled_for.py h200 update        # Stable Diffusion 1.5, the preset sd15
    python benchmarks/compiled_for.py h200 sample --rollout.microbatch 4 --hlo sample.hlo
    python benchmarks/compiled_for.py tpu-v5e update --devices 4

XLA compiles for a description of the device. Temporary memory is exact, and so is which kernels
there are; which algorithm a product takes is not, for that is measured on the device. So times are
a roofline: a kernel takes what its scarcer resource needs, at the shares of it that two programs
reached on an H200 (`devices.py`), and a time of its own besides.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

# Of NVIDIA's compute capability 9.0: multiprocessors, bytes a second, bytes, clock in GHz.
_HOPPER = {"h100": (132, 3.35e12, 80e9, 1.98), "h200": (132, 4.8e12, 141e9, 1.98)}
_TOPOLOGIES = {"tpu-v4": "v4:2x2x1", "tpu-v5e": "v5e:2x2", "tpu-v6e": "v6e:2x2"}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_SIZES |= {"s64": 8, "u64": 8, "f64": 8}
# What costs nothing by itself.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota")
_MOVES = {"parameter", "constant", "transpose", "copy", "bitcast", "convert", "slice", "pad"}
_MOVES |= {"concatenate", "reshape"}


class Kernel(NamedTuple):
    """One kernel of a compiled program.

    Attributes:
        kind: gemm, convolution, attention, layout (data moved or cast), reduction, elementwise.
        flops: of products and convolutions, each time.
        bytes: read and written, each time.
        times: how often it runs.
        name: of the operation in the traced program.
    """

    kind: str
    flops: float
    bytes: float
    times: int
    name: str


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    text: str


def kernels(hlo: str) -> list[Kernel]:
    """Return the kernels of a compiled GPU program, loops as often as they run.

    Args:
        hlo: its text, of `jax.stages.Compiled.as_text`.
    """
    computations, entry = _computations(hlo)
    return list(_kernels(computations, entry, 1))


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    found: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$", line)
        if head:
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif line == "}":
            current = ""
        elif current and (body := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)):
            found[current].append(_instruction(body[1], body[2]))
    return found, entry


def _instruction(name: str, text: str) -> _Instruction:
    if text.startswith("("):  # a tuple's type has brackets of its own
        depth, end = 1, 1
        while depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        kind, rest = text[:end], text[end + 1 :]
    else:
        kind, rest = text.split(" ", 1)
    opcode, _, arguments = rest.partition("(")
    operands = re.findall(r"%([\w.\-]+)", arguments.split(")", 1)[0])
    return _Instruction(name, kind, opcode, operands, rest)


def _arrays(text: str) -> list[tuple[list[int], int]]:
    """Return (shape, bytes) of every array in a type."""
    found = []
    for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", text):
        if kind in _SIZES:
            shape = [int(n) for n in axes.split(",") if n]
            found.append((shape, math.prod(shape) * _SIZES[kind]))
    return found


def _kernels(found: dict[str, list[_Instruction]], name: str, times: int) -> Iterator[Kernel]:
    types = {each.name: each.type for each in found[name]}
    for each in found[name]:
        if each.opcode in _FREE:
            continue
        if each.opcode == "while":
            body = re.search(r"body=%([\w.\-]+)", each.text)
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', each.text)
            assert body is not None
            yield from _kernels(found, body[1], times * int(count[1]) if count else times)
            continue
        shapes = [_arrays(types.get(operand, "")) for operand in each.operands]
        moved = sum(size for _, size in _arrays(each.type))
        moved += sum(size for arrays in shapes for _, size in arrays)
        operation = re.search(r'op_name="([^"]*)"', each.text)
        operation_name = operation[1] if operation else each.name
        kind, flops = _work(each, shapes, found)
        yield Kernel(kind, flops, moved, times, operation_name)


def _work(
    each: _Instruction,
    operands: list[list[tuple[list[int], int]]],
    found: dict[str, list[_Instruction]],
) -> tuple[str, float]:
    """Return the kind of a kernel and its operations."""
    target = re.search(r'custom_call_target="([^"]*)"', each.text)
    if target is None:
        called = re.search(r"calls=%([\w.\-]+)", each.text)
        inner = {part.opcode for part in found[called[1]]} if called else {each.opcode}
        if inner <= _MOVES:
            return "layout", 0.0
        if "dot" in inner:
            return "gemm", 0.0
        return ("reduction" if "reduce" in inner else "elementwise"), 0.0
    if "matmul" in target[1] or "gemm" in target[1]:
        axis = re.search(r'"lhs_contracting_dimensions":\["(\d+)"', each.text)
        depth = operands[0][0][0][int(axis[1])] if axis else 1
        return "gemm", 2.0 * math.prod(_arrays(each.type)[0][0]) * depth
    if "conv" in target[1].lower():
        labels = re.search(r"dim_labels=\w+_(\w+)->", each.text)
        kernel = operands[1][0][0]
        letters = labels[1] if labels else ""
        reach = math.prod(n for n, letter in zip(kernel, letters, strict=True) if letter != "o")
        # Forward every output, backward every gradient of one, meets the kernel's other axes.
        rows = operands[0][0][0] if "Backward" in target[1] else _arrays(each.type)[0][0]
        return "convolution", 2.0 * math.prod(rows) * reach
    return ("attention" if "fmha" in target[1] else "other"), 0.0


def table(found: list[Kernel], device: Any) -> str:
    """Return the kernels of a program by kind, with their time by the roofline.

    The operations of fused attention are not counted, so that it takes what its bytes take.
    """
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for each in found:
        row = rows[each.kind]
        arithmetic = each.flops / (device.flops * device.efficiency)
        moving = each.bytes / (device.bandwidth * device.bandwidth_efficiency)
        row[0] += each.times
        row[1] += each.times * each.flops
        row[2] += each.times * each.bytes
        row[3] += each.times * (max(arithmetic, moving) + device.latency)
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'':<14}{'kernels':>9}{'TFLOP':>10}{'GB':>10}{'ms':>10}"]
    for kind, (count, flops, moved, seconds) in sorted(rows.items(), key=lambda r: r[1][3]):
        work = f"{flops / 1e12:>10.3f}{moved / 1e9:>10.2f}"
        lines.append(f"{kind:<14}{count:>9.0f}{work}{1e3 * seconds:>10.2f}")
    return "\n".join(lines)


def collectives(hlo: str) -> str:
    """Return how often each kind of communication stands in a program, for a line of text."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "none"


def laid_out(arguments: tuple[Any, ...], size: int, parameters: int, mesh: Any) -> tuple[Any, ...]:
    """Lay a program's arguments out over devices: images divided, parameters on each of them.

    Args:
        arguments: arrays and shapes.
        size: images; an axis of this length is theirs.
        parameters: how many of the arguments are parameters.
        mesh: of the devices.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def there(x: Any, *, divided: bool) -> Any:
        axis = x.shape.index(size) if divided and size in x.shape else None
        places = () if axis is None else (*[None] * axis, mesh.axis_names)
        sharding = NamedSharding(mesh, PartitionSpec(*places))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return tuple(
        jax.tree.map(partial(there, divided=i >= parameters), argument)
        for i, argument in enumerate(arguments)
    )


def describe(name: str, count: int = 1) -> dict[str, Any]:
    """Return what JAX makes the topology of some devices from; of TPUs there are four."""
    if name in _TOPOLOGIES:
        return {"platform": "tpu", "topology_name": _TOPOLOGIES[name]}
    cores, bandwidth, memory, clock = _HOPPER[name]
    text = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: 62914560
  clock_rate_ghz: {clock} device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
    given = {"topology": f"1x1x{count}", "target_config": text}
    return {"platform": "cuda", "topology_name": name} | given


def main() -> None:
    """Compile, and say what came of it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="Other options are a run's."
    )
    parser.add_argument("device", choices=[*_HOPPER, *_TOPOLOGIES])
    parser.add_argument("program", choices=["sample", "update"])
    parser.add_argument("--preset", default="sd15")
    parser.add_argument("--devices", type=int, default=1, help="over which images are divided")
    parser.add_argument("--hlo", help="write the compiled program's text to this file")
    options, words = parser.parse_known_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this machine
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from diffusion_grpo import program_cache
    from diffusion_grpo.config import load_config
    from diffusion_grpo.devices import DEVICES
    from diffusion_grpo.fitting import fitted
    from diffusion_grpo.mesh import AXES, use
    from diffusion_grpo.models import kernels as attention
    from diffusion_grpo.plan import Planner
    from diffusion_grpo.published import find_architecture

    device = DEVICES[options.device]
    config = load_config(options.preset, words)
    model = find_architecture(config.model.pretrained, revision=config.model.revision)
    count = options.devices
    config, notes = fitted(config, model, device, count)
    print(*notes, sep="\n")

    topology = topologies.get_topology_desc(**describe(options.device, count))
    if count > len(topology.devices):
        parser.error(f"there are {len(topology.devices)} of {options.device}, not {count}")
    mesh = Mesh(
        np.array(topology.devices[:count]).reshape(count, 1),
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    )
    compiler_options: dict[str, Any] = {}
    if device.backend == "gpu":
        from jax._src.cudnn import fused_attention_stablehlo as fused

        # JAX asks the device and its cuDNN, which are not here, whether they know the kernel.
        fused.check_cudnn_version = lambda *_: 91000
        fused.check_compute_capability = lambda *_: None
        # Triton's sizes of tiles are measured, cuBLAS is there anyway.
        compiler_options = {"xla_gpu_enable_triton_gemm": False} | program_cache.GPU_OPTIONS
    attention.backend = lambda: device.backend
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what is computed is computed here
        planner = Planner(config, model, device, count)
    is_update = options.program == "update"
    section = config.grpo if is_update else config.rollout
    size = section.images_at_once
    function, arguments = getattr(planner, f"{options.program}_program")(size)
    # The update is such a program, which gives its gradient's memory away; the sampler calls one.
    compilable: Any = function if hasattr(function, "lower") else jax.jit(function)
    with use(mesh):
        if is_update and not planner.nft:  # each device sums up the gradient of its own images
            zeros = jax.eval_shape(planner.learner.loss.zeros, planner.policy.trained)
            sums = NamedSharding(mesh, PartitionSpec(AXES if planner.learner.loss.local else None))
            gradient = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sums), zeros
            )
            lowered = compilable.lower(gradient, *laid_out(arguments[1:], size, 2, mesh))
        else:
            parameters = 5 if is_update else 2
            lowered = compilable.lower(*laid_out(arguments, size, parameters, mesh))
    compiled = lowered.compile(compiler_options=compiler_options)
    text = compiled.as_text() or ""
    if options.hlo:
        with open(options.hlo, "w", encoding="utf-8") as file:
            file.write(text)
    memory: Any = compiled.memory_analysis()
    print(f"{options.program} of {size} images on {count} x {options.device}")
    print(f"communication {collectives(text)}")
    print(f"arguments {memory.argument_size_in_bytes / 2**30:.3f} GiB")
    print(f"temporary {memory.temp_size_in_bytes / 2**30:.3f} GiB")
    with attention.planned_for(device.backend):
        cost = getattr(planner, options.program)(size // count)
    print(f"temporary, as planned {device.slack * cost.peak / 2**30:.3f} GiB")
    if device.backend == "gpu":
        print(table(kernels(text), device))


if __name__ == "__main__":
    sys.exit(main())
