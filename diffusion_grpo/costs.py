"""What a traced program needs on a device: operations, bytes moved, memory at its peak.

The program is not compiled, so the answer takes seconds for a UNet of any size. It is the traced
equations in their order, under a few rules for what XLA does with them: elementwise work is fused
into what reads it and leaves nothing in memory, unless a product, a convolution or a loop needs it,
or several readers (on accelerators where that moves fewer bytes than computing it anew for each);
everything else is written once, and freed after its last reader.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from diffusion_grpo.flops import equation_flops, inner_programs
from diffusion_grpo.models.kernels import backend

FUSED = "fused_attention"  # programs of this name are one kernel: what is inside is never stored

# Written to memory whatever reads them; the rest is elementwise or moves axes.
_STORED = (
    "dot_general",
    "conv_general_dilated",
    "concatenate",
    "gather",
    "scatter",
    "scatter-add",
    "dynamic_update_slice",
    "sort",
    "scan",
    "while",
    "cond",
    "random_bits",
    "threefry2x32",
)
_CALLS = ("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
_CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_VIEWS = ("reshape", "squeeze", "expand_dims", "optimization_barrier", "copy", "stop_gradient")


@dataclasses.dataclass
class Operation:
    """One equation with a cost of its own.

    Attributes:
        flops: of products and convolutions.
        bytes: read and written.
        times: how often it runs.
    """

    flops: float
    bytes: float
    times: int = 1


@dataclasses.dataclass
class Cost:
    """What a program needs.

    Attributes:
        operations: in order.
        peak: bytes alive at the worst moment, beside the arguments.
        arguments: bytes of the arguments.
    """

    operations: list[Operation]
    peak: int
    arguments: int

    @property
    def flops(self) -> float:
        """All operations of products and convolutions."""
        return sum(op.flops * op.times for op in self.operations)

    @property
    def bytes(self) -> float:
        """All bytes read and written."""
        return sum(op.bytes * op.times for op in self.operations)

    def seconds(
        self,
        flops_per_second: float,
        bytes_per_second: float,
        *,
        cache: float = 0.0,
        cache_speedup: float = 1.0,
        latency: float = 0.0,
    ) -> float:
        """Time by the roofline: each operation takes what its scarcer resource needs.

        Args:
            flops_per_second: of products and convolutions.
            bytes_per_second: to and from memory.
            cache: an operation that moves less than these bytes finds them in the cache.
            cache_speedup: how many times faster they are moved then.
            latency: of each operation, in seconds, whatever its size.
        """

        def moving(op: Operation) -> float:
            return op.bytes / (bytes_per_second * (cache_speedup if op.bytes < cache else 1.0))

        return sum(
            op.times * (latency + max(op.flops / flops_per_second, moving(op)))
            for op in self.operations
        )


def program_cost(function: Callable[..., Any], *args: Any, **kw: Any) -> Cost:
    """Find the cost of a call on the device that is traced for; nothing is computed or compiled.

    Args:
        function: traceable by JAX.
        *args: arrays or `jax.ShapeDtypeStruct`s.
        **kw: static arguments of a function that is jitted with them.
    """
    return _cost(jax.make_jaxpr(lambda *inner: function(*inner, **kw))(*args).jaxpr)


def _bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    item = getattr(dtype, "itemsize", 4)
    return math.prod(getattr(aval, "shape", ())) * item


@dataclasses.dataclass
class _Step:
    """A flattened equation: numbers of values in and out."""

    equation: Any
    inputs: list[int]
    outputs: list[int]


class _Flat:
    """A program with its calls inlined; values are numbers."""

    def __init__(self, jaxpr: Any) -> None:
        self.sizes: list[int] = []
        self.steps: list[_Step] = []
        inputs = [self.new(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
        self.inputs = inputs
        self.outputs = self.inline(jaxpr, inputs)

    def new(self, aval: Any) -> int:
        self.sizes.append(_bytes(aval))
        return len(self.sizes) - 1

    def inline(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

        def number(atom: Any) -> int:
            return -1 if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            inner = inner_programs(equation.params)
            given = [number(atom) for atom in equation.invars]
            if equation.primitive.name in _CALLS and not _is_fused(equation) and inner:
                body = inner[0]
                spare = len(body.constvars)
                found = self.inline(body, [*[-1] * spare, *given])
            else:
                found = [self.new(v.aval) for v in equation.outvars]
                self.steps.append(_Step(equation, given, found))
            known.update(zip(equation.outvars, found, strict=True))
        return [number(atom) for atom in jaxpr.outvars]


def _is_fused(equation: Any) -> bool:
    return str(equation.params.get("name", "")).startswith(FUSED)


def _is_stored(equation: Any) -> bool:
    name = equation.primitive.name
    reduces = name.startswith(("reduce_", "argm", "cum")) and name != "reduce_precision"
    return name in _STORED or reduces or _is_fused(equation)


def _needs_storage(equation: Any) -> bool:
    """Whether an equation reads its operands from memory, not from what computes them."""
    name = equation.primitive.name
    return _is_stored(equation) and not name.startswith(("reduce_", "argm"))


def _cost(jaxpr: Any) -> Cost:
    flat = _Flat(jaxpr)
    readers = [0] * len(flat.sizes)
    wanted = set(flat.outputs)  # values that have to be in memory
    for step in flat.steps:
        for value in set(step.inputs) - {-1}:
            readers[value] += 1
        if _needs_storage(step.equation):
            wanted.update(step.inputs)

    # roots: what of memory a value is computed from, where it is not in memory itself
    roots: dict[int, frozenset[int]] = {value: frozenset() for value in flat.inputs}
    roots[-1] = frozenset()
    inputs = set(flat.inputs)
    kept = backend() == "cpu"  # what several operations read, though it is elementwise
    operations, born, died = [], {}, {}
    extra: dict[int, int] = {}  # step → temporary bytes inside it
    for place, step in enumerate(flat.steps):
        equation = step.equation
        used = frozenset().union(*(roots[v] | ({v} & inputs) for v in step.inputs))
        alive = frozenset(root for root in used if root not in inputs)
        for root in alive:
            died[root] = place
        stored = _is_stored(equation)
        read = sum(flat.sizes[root] for root in used)
        many = any(
            readers[v] > 1 and (kept or _is_cheaper_stored(readers[v], read, flat.sizes[v]))
            for v in step.outputs
        )
        many = many and bool(used)
        view = equation.primitive.name in _VIEWS
        written = 0
        for value in step.outputs:
            needed = stored or ((value in wanted or many) and not view)
            if view and len(used) > 1 and value in wanted:
                needed = True
            if needed:
                roots[value] = frozenset({value})
                born[value] = died[value] = place
                written += flat.sizes[value]
            else:
                roots[value] = alive
        if written or stored:
            inner, temporary = _inner_operations(equation)
            extra[place] = temporary
            moved = written + read
            operations += inner or [Operation(equation_flops(equation), moved)]
    # What is only added to an argument is added in place, as soon as it is there.
    last = len(flat.steps)
    for value in flat.outputs:
        if value in born and not _added_to_argument(flat, value, inputs):
            died[value] = last
        elif value in born:
            for root in roots.get(value, ()):  # the sum takes the argument's place
                died[root] = born[root]
            flat.sizes[value] = 0
    return Cost(operations, _peak(flat, born, died, extra), sum(flat.sizes[v] for v in inputs))


def _is_cheaper_stored(readers: int, read: int, size: int) -> bool:
    """Whether a value is rather stored than computed anew by each of its readers.

    Args:
        readers: how many.
        read: bytes that it is computed from.
        size: its own bytes.
    """
    return readers * read > read + (1 + readers) * size


def _added_to_argument(flat: _Flat, value: int, inputs: set[int]) -> bool:
    for step in reversed(flat.steps):
        if value in step.outputs:
            return step.equation.primitive.name in ("add", "add_any") and bool(
                inputs & set(step.inputs)
            )
    return False


def _peak(flat: _Flat, born: dict[int, int], died: dict[int, int], extra: dict[int, int]) -> int:
    change = [0] * (len(flat.steps) + 2)
    for value, start in born.items():
        change[start] += flat.sizes[value]
        change[died[value] + 1] -= flat.sizes[value]
    alive, peak = 0, 0
    for place in range(len(flat.steps) + 1):
        alive += change[place]
        peak = max(peak, alive + extra.get(place, 0))
    return peak


def _inner_operations(equation: Any) -> tuple[list[Operation], int]:
    """Return the operations of a loop or a branch, and what they hold while they run."""
    name = equation.primitive.name
    if name not in ("scan", "while", "cond"):
        return [], 0
    costs = [_cost(program) for program in inner_programs(equation.params)]
    if not costs:
        return [], 0
    if name == "cond":
        costs = [max(costs, key=lambda cost: cost.flops)]
    times = equation.params["length"] if name == "scan" else 1
    found = [
        dataclasses.replace(op, times=op.times * times) for cost in costs for op in cost.operations
    ]
    temporary = max(cost.peak for cost in costs)
    if name == "scan" and backend() != "cpu":
        # Brought into the order that the convolutions want once, before the loop.
        (body,) = inner_programs(equation.params)
        temporary += _kernel_bytes(body, equation.params["num_consts"])
    return found, temporary


def _kernel_bytes(body: Any, constants: int) -> int:
    """Bytes of those constants of a loop that its convolutions take as kernels."""
    flat = _Flat(body)
    kernels = {
        step.inputs[1]
        for step in flat.steps
        if step.equation.primitive.name == "conv_general_dilated"
    }
    spare = len(body.constvars)
    return sum(flat.sizes[v] for v in flat.inputs[: spare + constants] if v in kernels)
