"""Virtual devices of a CPU get threads enough to wait for each other."""

import os
import subprocess
import sys

import pytest

from diffusion_grpo.virtual_devices import VARIABLE, give_threads

CORES = os.cpu_count() or 1
FLAG = "--xla_force_host_platform_device_count="


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"XLA_FLAGS": f"{FLAG}1"}, None),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}, None),
        ({"XLA_FLAGS": f"--a=1 {FLAG}{CORES + 3} --b"}, 2 * (CORES + 3)),
        ({"XLA_FLAGS": f"{FLAG}2 {FLAG}{CORES + 1}"}, 2 * (CORES + 1)),  # XLA takes the last one
        ({"JAX_NUM_CPU_DEVICES": str(CORES + 2)}, 2 * (CORES + 2)),
        ({"XLA_FLAGS": f"{FLAG}8", VARIABLE: "3"}, 3),
    ],
)
def test_two_threads_a_device_or_core_unless_told(variables, threads):
    give_threads(variables)
    assert variables.get(VARIABLE) == (None if threads is None else str(threads))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed by Linux")
def test_xla_reads_the_variable():
    program = "import os, jax; jax.devices(); print(len(os.listdir('/proc/self/task')))"

    def threads(number):
        environment = os.environ | {VARIABLE: str(number)}
        command = [sys.executable, "-c", program]
        return int(subprocess.check_output(command, env=environment, text=True))

    assert threads(12) - threads(4) >= 8
