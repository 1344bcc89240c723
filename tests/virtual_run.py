"""Scripts on virtual devices, each in a process of its own: their number is fixed as JAX starts."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def said_on(
    devices: int, script: str, *words: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Run a script of this folder on virtual devices of the CPU; return its last line, as JSON."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    said = subprocess.check_output(
        [sys.executable, f"tests/{script}", *words],
        env=os.environ | {"XLA_FLAGS": flags} | dict(environment or {}),
        cwd=Path(__file__).parents[1],
        text=True,
    )
    return json.loads(said.splitlines()[-1])
