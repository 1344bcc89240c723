"""The errors that a user can mend, and the hint that helps to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something that was asked for cannot be done, and the user can mend it.

    The message names the thing, the value given, what was expected and the likely mend. The
    command line prints it and exits with code 2.
    """


class RewardError(RuntimeError):
    """A reward failed, or returned something that is not one finite number an image.

    The command line prints it and exits with code 1.
    """


class RunError(RuntimeError):
    """Something outside of the program stopped a run: a disk, the memory of a device, bad numbers.

    The message says which checkpoint is the last good one. The command line prints it and exits
    with code 1.
    """


class Preempted(RuntimeError):
    """A run was asked to stop by SIGTERM, has saved everything, and can be resumed.

    The command line prints it and exits with code `PREEMPTED_EXIT_CODE`.
    """


PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return the end of a sentence that proposes the choice nearest to a mistyped name.

    Args:
        name: what was given.
        choices: the names that exist.

    Returns:
        `" (did you mean 'x'?)"`, or `""` where nothing is near.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
