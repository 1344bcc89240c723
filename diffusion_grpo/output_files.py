"""Files that a command is asked to write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffusion_grpo.errors import UsageError


def check_output(path: Path, suffixes: Sequence[str]) -> Path:
    """Check that a file can be written, before any work is done for it.

    Raises:
        UsageError: its suffix is another, it is a folder, or its folder does not exist; it cannot
            be written.
    """
    path = path.expanduser()
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"output {str(path)!r} does not end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(
            f"output {str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder; expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"output {str(path)!r} cannot be written; choose another folder or name")
    return path
