"""What to type to install something that the project asks for, however it was itself installed."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "diffusion-grpo"


def install_command(extra: str) -> str:
    """Return the `pip` line that installs an extra's packages.

    It names the packages, not the project: of what was installed from a checkout or a wheel file,
    the project's name alone would be looked up elsewhere.

    Args:
        extra: the name of one of the extras in `pyproject.toml`.

    Raises:
        KeyError: there is no such extra.
    """
    asked = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    marked = [(requirement, requirement.marker) for requirement in asked]
    wanted = [
        requirement
        for requirement, marker in marked
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
    ]
    if not wanted:
        raise KeyError(extra)
    return pip_line(wanted)


def pip_line(requirements: Iterable[Requirement]) -> str:
    """Return the `pip` line that installs packages, each as it is asked for."""
    words = []
    for requirement in requirements:
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        words.append(f"{requirement.name}{extras}{requirement.specifier}")
    return f"pip install {shlex.join(words)}"
