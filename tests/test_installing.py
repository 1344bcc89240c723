"""What a user is told to install is what pyproject.toml asks for."""

import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from diffusion_grpo.installing import install_command

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", sorted({*EXTRAS} - {"test", "dev"}))
def test_the_line_names_the_packages_of_the_extra(extra):
    program, action, *packages = shlex.split(install_command(extra))
    assert (program, action) == ("pip", "install")
    assert {Requirement(p) for p in packages} == {Requirement(p) for p in EXTRAS[extra]}


def test_an_extra_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="torch"):
        install_command("torch")
