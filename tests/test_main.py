"""The command as a process."""

import os
import subprocess
import sys

import pytest

from diffusion_grpo.__main__ import run


@pytest.mark.parametrize("words", [["list", "metrics"], ["train", "--help"]])
def test_a_reader_that_has_enough_ends_the_command_without_a_traceback(words):
    # `| head -1` in the extreme: nobody reads from the beginning.
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "diffusion_grpo", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_connection_is_not_taken_for_a_reader_that_has_enough(monkeypatch):
    def fail():
        raise BrokenPipeError("the server's")

    monkeypatch.setattr("diffusion_grpo.cli.main", fail)
    monkeypatch.setattr(sys, "argv", ["diffusion-grpo", "list"])
    with open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError, match="the server's"):
            run()
