"""Threads for the virtual devices of a CPU.

XLA gives a CPU client as many threads as there are cores or devices, whichever is more. A device
that waits in a collective operation holds one of them, while another device's convolutions ask for
several: with two devices on two cores both waited for ever, until XLA ended the process after 40
seconds ("Termination timeout for all gather"). XLA reads the number from the environment as its
client starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

VARIABLE = "PJRT_NPROC"
_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def give_threads(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of threads, where there are several virtual devices and it is not set.

    Args:
        variables: the environment; changed in place.
    """
    count = virtual_devices(variables)
    if count > 1:
        # Half of them may wait, and each device still has one that computes.
        variables.setdefault(VARIABLE, str(2 * max(count, os.cpu_count() or 1)))


def virtual_devices(variables: Mapping[str, str]) -> int:
    """Return how many CPU devices the environment asks for; 1 if it does not say."""
    found = _FLAG.findall(variables.get("XLA_FLAGS", ""))
    given = variables.get("JAX_NUM_CPU_DEVICES", "")
    return int(found[-1]) if found else int(given) if given.isdigit() else 1
