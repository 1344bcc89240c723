"""The C library's heap: large blocks on huge pages.

XLA's CPU backend asks the C library for a program's scratch memory at each call and frees it after.
glibc takes such a block from the system each time and gives it back, so that every page is zeroed
and mapped again at the first touch: with pages of 4 KiB that was a third of the embedded model's
update. glibc asks for huge pages where a tunable says so, which it reads as a process starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb=1"
SINCE = (2, 35)  # the release of glibc that has it


def start_with_huge_pages() -> None:
    """Start this command once more, in this process, with huge pages for its heap.

    Returns if there is nothing to gain: see `environment`.
    """
    changed = environment(os.environ, glibc_version(), pages())
    if changed is None or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)
    except OSError:  # slower, but not wrong
        return


def environment(
    variables: Mapping[str, str], glibc: tuple[int, ...], pages: str
) -> dict[str, str] | None:
    """Return the environment in which the heap has huge pages.

    Args:
        variables: the environment as it is.
        glibc: its release, or ().
        pages: what `HUGE_PAGES` holds.

    Returns:
        None where that changes nothing: the C library is another, or too old; the system gives
        huge pages to everyone or to no one; or the heap is tuned already.
    """
    tunables = variables.get("GLIBC_TUNABLES", "")
    if glibc < SINCE or "[madvise]" not in pages or "glibc.malloc." in tunables:
        return None
    return {**variables, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, TUNABLE)))}


def glibc_version() -> tuple[int, ...]:
    """Return glibc's release, such as (2, 36); () where the C library is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else ()
    except (AttributeError, ValueError, OSError):
        return ()


def pages() -> str:
    """Return which memory the system puts on huge pages, as it says; empty if it does not."""
    try:
        return HUGE_PAGES.read_text()
    except OSError:
        return ""
