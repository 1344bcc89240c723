"""Which reward files a run was last scored by, so that it says when one was edited since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from diffusion_grpo.config import Config
from diffusion_grpo.output_files import write_whole
from diffusion_grpo.reward_specs import split_spec

REWARDS_FILE = "rewards.json"  # in a run's directory


def describe_reward_files(config: Config) -> dict[str, str]:
    """Return the short names of a run's rewards that are Python files → their SHA-256.

    What such a file imports is not looked at, nor are packages and servers.

    Args:
        config: the run's, whose rewards were found.
    """
    found = {}
    for spec in (*config.training_rewards(), *config.gold_rewards()):
        kind, place, _ = split_spec(spec.spec)
        if kind == "file":
            content = Path(place).expanduser().read_bytes()
            found[spec.name] = hashlib.sha256(content).hexdigest()
    return found


def edited_rewards(directory: Path, files: Mapping[str, str]) -> list[str]:
    """Return what to tell of rewards that were edited since the run was last begun or resumed.

    A reward that failed is mended and the run gone on with, so that it is no error.

    Args:
        directory: of the run.
        files: of `describe_reward_files`.

    Returns:
        A line for each that was, or one if the record of them is damaged.
    """
    path = directory / REWARDS_FILE
    if not path.is_file():  # the run was killed before it was written
        return []
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return [f"{path} is damaged, and written anew: it is not known if rewards were edited"]
    return [
        f"the file of reward {name!r} was edited since the run began or was last resumed: from "
        "here on its values may not compare with those before"
        for name, digest in files.items()
        if before.get(name, digest) != digest
    ]


def record_reward_files(directory: Path, files: Mapping[str, str]) -> None:
    """Write down which reward files a run is scored by from now on.

    Args:
        directory: of the run, which is this process's.
        files: of `describe_reward_files`.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(directory / REWARDS_FILE, json.dumps(dict(files), indent=2) + "\n")
