"""What a run's rewards are made of: one that goes on scores as it did, or says otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from diffusion_grpo.config import Config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import write_whole
from diffusion_grpo.reward_specs import split_spec

RECORD_FILE = "rewards.json"  # in a run's directory


class RewardRecord(NamedTuple):
    """What a run's rewards are made of.

    Attributes:
        files: short name of a reward that is a Python file → its SHA-256. What such a file imports
            is not looked at, nor are packages and servers.
        commits: hub repository that is named without a revision → the commit that is read of it.
    """

    files: dict[str, str]
    commits: dict[str, str]


def describe_rewards(config: Config, commits: Mapping[str, str]) -> RewardRecord:
    """Return what a run's rewards are made of.

    Args:
        config: the run's, whose rewards were loaded.
        commits: of `hub.commits_kept`, within which they were.
    """
    files = {}
    for spec in (*config.training_rewards(), *config.gold_rewards()):
        kind, place, _ = split_spec(spec.spec)
        if kind == "file":
            content = Path(place).expanduser().read_bytes()
            files[spec.name] = hashlib.sha256(content).hexdigest()
    return RewardRecord(files, dict(commits))


def read_record(directory: Path) -> RewardRecord:
    """Return what the rewards of a run were made of when it was last begun or resumed.

    Args:
        directory: of the run; of one that was killed before it was written, nothing is known.

    Raises:
        UsageError: the record is damaged.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return RewardRecord({}, {})
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, commits = (
            {str(key): str(value) for key, value in record[part].items()}
            for part in RewardRecord._fields
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{path} does not say what the run's rewards are made of; expected JSON, as `train` "
            "writes it: put it back, or delete it if the rewards are what they were"
        ) from None
    return RewardRecord(files, commits)


def edited_rewards(before: RewardRecord, now: RewardRecord) -> list[str]:
    """Return what to tell of reward files that were edited in between, a line each.

    A reward that failed is mended and the run gone on with, so that it is no error.
    """
    return [
        f"the file of reward {name!r} was edited since the run began or was last resumed: from "
        "here on its values may not compare with those before"
        for name, digest in now.files.items()
        if before.files.get(name, digest) != digest
    ]


def write_record(directory: Path, record: RewardRecord) -> None:
    """Write down what a run's rewards are made of from now on.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(directory / RECORD_FILE, json.dumps(record._asdict(), indent=2) + "\n")
