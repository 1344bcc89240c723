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


# A command line that says how its process was started, and how often it faulted when it filled
# 100 MiB anew.
COMMAND = """
import json, os, resource, sys
import numpy as np
from diffusion_grpo import cli

def main(argv=None):
    np.empty(100 * 2**20, np.uint8).fill(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(100 * 2**20, np.uint8).fill(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    print(json.dumps({"pid": os.getpid(), "faults": faults, "tunables": tunables}))
    return int(sys.argv[1])

cli.main = main
from diffusion_grpo.__main__ import run
run()
"""


def test_a_command_starts_once_more_in_its_own_process(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, str(script), "7"], env=variables, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate(timeout=60)
    found = json.loads(out)  # one line: what is before the start is not done twice
    assert process.returncode == 7  # with the same arguments
    assert found["pid"] == process.pid
    if environment(variables, glibc_version(), pages()) is None:
        assert found["tunables"] == ""
    else:
        assert found["tunables"] == "glibc.malloc.hugetlb=1"
        assert found["faults"] < 12800  # half of the pages of 4 KiB, however full the memory is
