"""How fast a run goes on this machine: the run's own functions, timed.

A `Workload` is one iteration's work. Each phase is called once to compile and then timed, blocked
on its result; an iteration is timed whole too, as the run overlaps its phases.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_grpo.lanes import cores
from diffusion_grpo.pretrained import DTYPES
from diffusion_grpo.workload import PHASES, Workload


@dataclasses.dataclass
class Timing:
    """Seconds of a phase.

    Attributes:
        first: of the first call, which compiles.
        calls: of those after it.
    """

    first: float
    calls: list[float]

    @property
    def median(self) -> float:
        """The median of the calls after the first, or the first if there are none."""
        return statistics.median(self.calls) if self.calls else self.first


def matrix_rate(dtype: Any, *, size: int | None = None, repeats: int = 5) -> float:
    """Measure the device's rate of a matrix product, in operations a second; the best of some.

    Args:
        dtype: of the matrices.
        size: of the square matrices; by default 8192 on an accelerator and 1024 on a CPU.
        repeats: timed calls, of several products each.
    """
    accelerator = jax.default_backend() != "cpu"
    size = size or (8192 if accelerator else 1024)
    count = 16 if accelerator else 4
    key = jax.random.key(0)
    matrix = jax.random.normal(key, (size, size), jnp.float32) / jnp.float32(size) ** 0.5
    matrix = matrix.astype(dtype)

    @jax.jit
    def products(x: Any) -> Any:
        for _ in range(count):
            x = x @ matrix
        return x

    timing = timed(lambda: products(matrix), repeats)
    return count * 2 * size**3 / min(timing.calls)


def timed(call: Callable[[], Any], repeats: int) -> Timing:
    """Time a call that returns arrays, blocked on them, and once more before that."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return Timing(seconds[0], seconds[1:])


def measure(
    work: Workload,
    *,
    repeats: int,
    phases: Sequence[str] = PHASES,
    on_result: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Time the phases of an iteration.

    Args:
        work: the iteration.
        repeats: timed calls of each phase, after the first.
        phases: which of `PHASES`.
        on_result: called with all that is known so far, after every phase.

    Returns:
        The record that `diffusion-grpo bench --json` writes; times in seconds, rates in 1/s.
    """
    record: dict[str, Any] = describe(work)
    rates = record["rates"] = {}
    images = work.config.rollout.num_images
    for name, call in work.phases.items():
        if name not in phases:
            continue
        if name == "iteration":
            parts = [work.iteration() for _ in range(repeats + 1)]
            timing = Timing(parts[0]["iteration"], [part["iteration"] for part in parts[1:]])
            record["iterations"] = parts
        else:
            timing = timed(call, repeats)
        record["seconds"][name] = dataclasses.asdict(timing) | {"median": timing.median}
        count, unit = images, "images/s"
        if name == "encode":
            count, unit = work.config.rollout.prompts_per_iteration + 1, "prompts/s"
        elif name == "update":
            count, unit = work.images_learned * work.learner.steps_learned[1], "policy steps/s"
            count *= work.config.grpo.updates_per_rollout
        rates[name] = {"rate": count / timing.median, "unit": unit}
        record["memory"] = work.memory() if name == "update" else record.get("memory", {})
        on_result(record)
    record["memory"] = record.get("memory", {}) | work.memory()
    record["flops"] = flops = work.flops()
    record["matrix_flops_per_second"] = rate = matrix_rate(DTYPES[work.config.model.dtype])
    record["mfu"] = {
        name: flops[name] / record["seconds"][name]["median"] / rate
        for name in ("sample", "update")
        if name in flops and name in record["seconds"]
    }
    on_result(record)
    return record


def describe(work: Workload) -> dict[str, Any]:
    """Return what is measured and on what, to be filled with the measurements."""
    config, device = work.config, jax.local_devices()[0]
    active, differentiated = work.learner.steps_learned
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": 1,  # whatever else is here: all arrays of a workload are on one
            "available": jax.local_device_count(),
            "cores": cores(),
            "matrix_dtype": config.model.dtype,
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "work": {
            "algorithm": config.grpo.algorithm,
            "images": config.rollout.num_images,
            "images_learned": work.images_learned,
            "steps": config.rollout.num_steps,
            "steps_learned": differentiated,
            "steps_active": active,
            "updates": config.grpo.updates_per_rollout,
            "microbatch": config.rollout.images_at_once,
            "update_microbatch": config.grpo.images_at_once,
            "latent": list(work.shape),
            "guidance_scale": config.rollout.guidance_scale,
            "dtype": config.model.dtype,
            "trainable": config.model.trainable,
            "lora_rank": config.model.lora_rank,
            "gradient_checkpointing": config.model.gradient_checkpointing,
            "reference": config.grpo.beta > 0,
        },
        "seconds": {},
    }


def table(record: Mapping[str, Any]) -> str:
    """Return what was measured of us, as lines of text."""
    work, device = record["work"], record["device"]
    available = device["available"]
    used = f", {device['count']} of {available} devices used" if available > 1 else ""
    lines = [
        f"{device['count']} x {device['kind']} ({device['platform']}){used}, {work['dtype']}, "
        f"{work['images']} images of {work['steps']} steps, {work['steps_learned']} learned from "
        f"in {work['images_learned']} of them",
        f"{'phase':<14}{'first call':>12}{'median':>12}{'rate':>24}{'MFU':>8}",
    ]
    for name, seconds in record["seconds"].items():
        rate = record["rates"][name]
        share = record.get("mfu", {}).get(name)
        lines.append(
            f"{name:<14}{seconds['first']:>10.3f} s{seconds['median']:>10.4f} s"
            f"{rate['rate']:>9.4g} {rate['unit']:<14}{'' if share is None else f'{share:>7.1%}'}"
        )
    for name, size in record.get("memory", {}).items():
        lines.append(f"{name.replace('_', ' ') + ' memory':<26}{size / 2**30:>10.3f} GiB")
    if "matrix_flops_per_second" in record:
        rate = record["matrix_flops_per_second"]
        lines.append(f"{'matrix products':<26}{rate / 1e12:>10.3f} TFLOP/s")
    return "\n".join(lines)


def peers_table(record: Mapping[str, Any]) -> str:
    """Return what was measured of peers, as lines of text."""
    lines = []
    for name, peer in record.get("peers", {}).items():
        if "error" in peer:
            lines.append(f"torch {name}: {peer['error']}")
        for phase, ratio in peer.get("ratios", {}).items():
            lines.append(
                f"torch {name:<9}{phase:<12}{ratio['theirs']:>10.4f} s, ours {ratio['ours']:.4f} s"
                f": {ratio['median']:.2f} times ({', '.join(f'{r:.2f}' for r in ratio['pairs'])})"
            )
    return "\n".join(lines)
