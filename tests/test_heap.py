"""Commands run with huge pages for the heap where the system leaves it to the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_grpo.heap import environment, glibc_version, pages

MADVISE = "always [madvise] never\n"


def test_the_tunable_is_added_to_those_that_are_there() -> None:
    assert environment({"A": "1"}, (2, 36), MADVISE) == {
        "A": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    changed = environment({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, (2, 35), MADVISE)
    assert changed == {"GLIBC_TUNABLES": "glibc.pthread.rseq=0:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("variables", "glibc", "given"),
    [
        ({}, (), MADVISE),
        ({}, (2, 31), MADVISE),
        ({}, (2, 36), "[always] madvise never\n"),
        ({}, (2, 36), "always madvise [never]\n"),
        ({}, (2, 36), ""),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, (2, 36), MADVISE),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, (2, 36), MADVISE),
    ],
)
def test_nothing_is_changed_where_it_would_not_help_or_is_chosen(
    variables: dict[str, str], glibc: tuple[int, ...], given: str
) -> None:
    assert environment(variables, glibc, given) is None


# A command line that says how its process was started, and whether the kernel was asked for huge
# pages ("hg") where an array of 100 MiB lies.
COMMAND = """
import json, os, sys
import numpy as np
from diffusion_grpo import cli

def flags(address):
    found = False
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(word, 16) for word in words[0].split("-"))
            found = first <= address < last
        elif found and words[0] == "VmFlags:":
            return words[1:]

def main(argv=None):
    array = np.empty(100 * 2**20, np.uint8)
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    found = {"pid": os.getpid(), "tunables": tunables, "arguments": sys.argv[1:]}
    if sys.platform == "linux":
        found["huge"] = "hg" in flags(array.ctypes.data + array.nbytes // 2)
    print(json.dumps(found))
    return 7

cli.main = main
from diffusion_grpo.__main__ import run
run()
"""


@pytest.mark.parametrize("command", ["train", "list"])
def test_a_command_that_computes_starts_once_more_in_its_own_process(
    tmp_path: Path, command: str
) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    # NumPy asks for huge pages on its own.
    variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    variables["NUMPY_MADVISE_HUGEPAGE"] = "0"
    process = subprocess.Popen(
        [sys.executable, str(script), command, "--quiet"],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    found = json.loads(out)
    assert process.returncode == 7
    assert found["pid"] == process.pid and found["arguments"] == [command, "--quiet"]
    helps = environment(variables, glibc_version(), pages()) is not None
    again = command == "train" and helps
    assert found["tunables"] == ("glibc.malloc.hugetlb=1" if again else "")
    if helps:
        assert found["huge"] == again
