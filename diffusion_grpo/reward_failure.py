"""What becomes of a run when a reward fails: stop, try again, or drop the group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from diffusion_grpo.errors import UsageError, suggest

_EXPECTED = "expected stop, retry=N (such as retry=3) or drop-group"


@dataclass(frozen=True)
class FailurePolicy:
    """What to do when a reward raises, or returns something that is not a score an image.

    Attributes:
        kind: `stop` the run; `retry` the call, then stop; or `drop-group`: leave the groups that
            it fails on out of the update.
        retries: how often a failed call is repeated.
    """

    kind: Literal["stop", "retry", "drop-group"] = "stop"
    retries: int = 0


def parse_failure_policies(
    entries: Sequence[str], names: Sequence[str]
) -> Mapping[str, FailurePolicy]:
    """Parse `[NAME=]stop`, `[NAME=]retry=N` and `[NAME=]drop-group`.

    Args:
        entries: for example `("retry=2", "ocr=drop-group")`; one without a name is for the rewards
            that no other entry names.
        names: the rewards in use.

    Returns:
        Reward name to policy, one for each of `names`.

    Raises:
        UsageError: a malformed policy, one for a reward that is not used, or two for the same.
    """
    found: dict[str, FailurePolicy] = {}
    for entry in entries:
        match = re.fullmatch(r"(?:(.*)=)?(stop|drop-group|retry=(\d+))", entry.strip())
        if not match:
            raise UsageError(f"reward.on_failure has {entry!r}; {_EXPECTED}, or NAME= before it")
        name = match[1] or ""
        if name and name not in names:
            raise UsageError(
                f"reward.on_failure has {entry!r} for the reward {name!r}, which is not used"
                f"{suggest(name, names)}; rewards in use: {', '.join(names)}"
            )
        if name in found:
            raise UsageError(
                f"reward.on_failure has a second policy {entry!r} for "
                f"{repr(name) if name else 'the rewards without a name'}: give one"
            )
        if match[3] is None:
            kind = "stop" if match[2] == "stop" else "drop-group"
            found[name] = FailurePolicy(kind)
        else:
            found[name] = FailurePolicy("retry", int(match[3]))
    rest = found.get("", FailurePolicy())
    return {name: found.get(name, rest) for name in names}
