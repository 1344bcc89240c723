"""The heap keeps what is freed: the second array of a size touches no new page."""

import os
import platform
import subprocess
import sys

import pytest

# Faults of a thread that fills an array of 100 MiB, after it did so before.
COUNT = """
import sys
from diffusion_grpo import cli
if sys.argv[1] == "kept":
    cli._prepare_jax()
import resource, threading
import jax, numpy as np

def fill():
    np.empty(100 * 2**20, np.uint8).fill(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

np.ones(4)
faults()
print(faults())
"""


def faults(how: str, **variables: str) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", COUNT, how],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap")
def test_a_command_touches_no_new_page_for_memory_that_it_freed() -> None:
    assert faults("kept") < 100
    assert faults("plain") > 20  # pages may be of 2 MiB
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 20  # the user's own choice stands
