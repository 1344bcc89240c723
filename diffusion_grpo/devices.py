"""What accelerators can do, as their makers publish it; this machine's CPU is measured."""

from __future__ import annotations

import dataclasses

from diffusion_grpo.costs import Cost
from diffusion_grpo.errors import UsageError, suggest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        backend: JAX's name of its kind: cpu, gpu or tpu.
        flops: dense bfloat16 products, operations a second.
        flops_float32: the same in float32 (TF32 where JAX uses it by default).
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        link: to its neighbors, bytes a second in one direction.
        efficiency: the share of the products' rate that convolutions and products reach.
        bandwidth_efficiency: the share of the bandwidth.
        slack: memory really taken, over what has to be alive: copies and fragments.
        cache: bytes that an operation may move and find in the cache, on a CPU.
        cache_speedup: how many times faster than the memory it is.
        backward: time of a gradient over what its operations would take by the above.
        latency: seconds of every operation beside that: of a GPU's kernels, for most are small.
    """

    backend: str
    flops: float
    flops_float32: float
    bandwidth: float
    memory: float
    link: float
    efficiency: float = 0.55
    bandwidth_efficiency: float = 0.63
    slack: float = 1.15
    cache: float = 0.0
    cache_speedup: float = 1.0
    backward: float = 1.0
    latency: float = 3.8e-6

    def seconds(self, cost: Cost, rate: float) -> float:
        """Return the time of a program by the roofline, at a rate of `flops` or the other."""
        return cost.seconds(
            rate * self.efficiency,
            self.bandwidth * self.bandwidth_efficiency,
            cache=self.cache,
            cache_speedup=self.cache_speedup,
            latency=self.latency,
        )


# As compiled for a v5e: narrow axes, such as heads of 40, are padded to 128.
TPU_SLACK = 1.8

# Makers' data sheets: dense rates, memory as sold (GB), NVLink or PCIe of one direction, ICI.
DEVICES: dict[str, Device] = {
    "h200": Device("gpu", 989e12, 494e12, 4.8e12, 141e9, 450e9),
    "h100": Device("gpu", 989e12, 494e12, 3.35e12, 80e9, 450e9),
    "a100-80gb": Device("gpu", 312e12, 156e12, 2.04e12, 80e9, 300e9),
    "a100-40gb": Device("gpu", 312e12, 156e12, 1.56e12, 40e9, 300e9),
    "l40s": Device("gpu", 362e12, 183e12, 864e9, 48e9, 32e9),
    "l4": Device("gpu", 121e12, 60e12, 300e9, 24e9, 32e9),
    "rtx4090": Device("gpu", 165e12, 82.6e12, 1.01e12, 24e9, 32e9),
    "rtx3090": Device("gpu", 71e12, 35.6e12, 936e9, 24e9, 32e9),
    "tpu-v4": Device("tpu", 275e12, 69e12, 1.23e12, 32e9, 100e9, slack=TPU_SLACK),
    "tpu-v5e": Device("tpu", 197e12, 49e12, 819e9, 16e9, 100e9, slack=TPU_SLACK),
    "tpu-v5p": Device("tpu", 459e12, 115e12, 2.77e12, 95e9, 200e9, slack=TPU_SLACK),
    "tpu-v6e": Device("tpu", 918e12, 230e12, 1.64e12, 32e9, 180e9, slack=TPU_SLACK),
}
NAMES = ("cpu", *DEVICES)


def find_device(name: str) -> Device:
    """Return a device by name; `cpu` is this machine, measured in about a second.

    Raises:
        UsageError: no such device.
    """
    if name == "cpu":
        return _this_machine()
    if name not in DEVICES:
        raise UsageError(
            f"device is {name!r}{suggest(name, NAMES)}; expected one of {', '.join(NAMES)}"
        )
    return DEVICES[name]


def device_here() -> Device:
    """Return the device that this process computes on, with the memory that JAX has of it.

    Of an accelerator that is not in the table, the rates are those of the nearest kind that is, for
    comparisons of one program with another.
    """
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        here = _this_machine()  # one memory, however many devices XLA makes of the cores
        return dataclasses.replace(here, memory=here.memory / jax.local_device_count())
    known = DEVICES[nearest(device.device_kind, device.platform)]
    stats = device.memory_stats() or {}
    return dataclasses.replace(known, memory=float(stats.get("bytes_limit", known.memory)))


def nearest(kind: str, platform: str) -> str:
    """Return the device of the table that JAX's name of a kind means, or one like it.

    Args:
        kind: such as "NVIDIA A100-SXM4-80GB" or "TPU v5 lite".
        platform: gpu or tpu.
    """
    plain = "".join(c for c in kind.lower() if c.isalnum())
    for spelled, name in _KINDS.items():
        if spelled in plain:
            return name
    return "tpu-v4" if platform == "tpu" else "a100-40gb"


# What JAX calls them, letters and digits alone; the first that is part of the name counts.
_KINDS = {
    "h200": "h200",
    "h100": "h100",
    "a100sxm480gb": "a100-80gb",
    "a100pcie80gb": "a100-80gb",
    "a100": "a100-40gb",
    "l40s": "l40s",
    "nvidial4": "l4",
    "rtx4090": "rtx4090",
    "rtx3090": "rtx3090",
    "tpuv4": "tpu-v4",
    "tpuv5lite": "tpu-v5e",
    "tpuv5e": "tpu-v5e",
    "tpuv5": "tpu-v5p",
    "tpuv6": "tpu-v6e",
}


def _this_machine() -> Device:
    import time

    import jax.numpy as jnp
    import numpy as np

    from diffusion_grpo.bench import matrix_rate

    rate = matrix_rate(jnp.float32)
    source = np.ones(1 << 25, np.float32)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    # XLA's CPU backend computes bfloat16 in float32.
    return Device("cpu", rate, rate, best, _memory_here(), best, **CPU_SHARES)


# Fitted to the embedded model at three sizes of picture on two cores (docs/performance.md).
CPU_SHARES: dict[str, float] = {
    "efficiency": 0.6,
    "bandwidth_efficiency": 1.0,
    "slack": 1.2,
    "cache": 16e6,
    "cache_speedup": 10.0,
    "backward": 1.7,
    "latency": 2e-6,
}


def _memory_here() -> float:
    import os

    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):  # not POSIX
        return 8.0 * GIB
