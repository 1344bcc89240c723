"""The C library's heap, so that an iteration's arrays are taken from memory that is there already.

XLA's CPU backend asks the C library for a program's scratch memory at each call and frees it after.
glibc takes blocks of 32 MiB and more from the system each time and gives them back, so that every
page is zeroed and mapped again at the first touch: in the update of the embedded model that was
a third of the time. Freed memory is kept instead, up to `KEPT_BYTES` at the end of the heap.
"""

from __future__ import annotations

import ctypes
import os

# The options of mallopt(3), from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

KEPT_BYTES = 2**30

# With one of these set, the user has chosen.
VARIABLES = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let the heap of this process keep what is freed; has to come before threads are started.

    All threads share one heap, because those of other threads hold no block above 64 MiB.

    Returns:
        Whether it does: not where the C library is another than glibc, nor where its heap is set in
        the environment (GLIBC_TUNABLES or one of `VARIABLES`).
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        library = ctypes.CDLL(None)
        _, mallopt = library.gnu_get_libc_version, library.mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, KEPT_BYTES))
    return all([mallopt(option, value) == 1 for option, value in options])
