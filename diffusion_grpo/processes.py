"""Several processes that are one run: who writes, what they tell each other, what they wait for.

All of them run the same program in the same order. Small things go through JAX's coordination
service and not through a device: a process may be minutes behind another, longer than some
collectives wait. Everything here is trivial in a single process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

PATIENCE_MS = 24 * 3600 * 1000  # a process that has ended is noticed by the service, and sooner
SPEAK_SECONDS = 60.0  # of waiting, before it is told for what

_numbers = itertools.count()
_sent: list[str] = []  # keys of this process that all others have read once a barrier is passed


def count() -> int:
    """Return how many processes the run has."""
    return jax.process_count()


def rank() -> int:
    """Return which of them this one is, from 0."""
    return jax.process_index()


def leads() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def service() -> Any:
    """Return the client of JAX's coordination service, or None in a process of its own."""
    from jax._src import distributed  # as in Orbax: JAX has no public name for it

    return distributed.global_state.client


def wait_for_all(what: str) -> None:
    """Wait until all processes have come here.

    Args:
        what: what is waited for; it names the barrier, and is told after a minute.
    """
    if count() > 1:
        with _told(what):
            service().wait_at_barrier(f"diffusion-grpo {next(_numbers)}: {what}", PATIENCE_MS)


def exchange(value: Any, what: str) -> list[Any]:
    """Give every process the values of all.

    Args:
        value: of this process, anything that JSON holds; float32 numbers arrive as they were.
        what: what is exchanged, for whom has to wait.

    Returns:
        One value a process, in their order.
    """
    if count() == 1:
        return [value]
    client, folder = service(), f"diffusion-grpo/{next(_numbers)}"
    key = f"{folder}/{rank()}"
    client.key_value_set(key, json.dumps(value))
    with _told(what):
        client.wait_at_barrier(f"{folder}: {what}", PATIENCE_MS)
    while _sent:  # the barrier is behind the reading of what was exchanged before
        client.key_value_delete(_sent.pop())
    _sent.append(key)
    found = dict(client.key_value_dir_get(f"{folder}/"))
    return [json.loads(found[f"{folder}/{process}"]) for process in range(count())]


def of_leader(value: Any, what: str) -> Any:
    """Return the value of the process that writes; the others' does not matter."""
    return exchange(value if leads() else None, what)[0]


def gather_rows(rows: np.ndarray, what: str) -> np.ndarray:
    """Join arrays of all processes along their first axis, in the order of the processes.

    Args:
        rows: of this process, `[n, ...]`; as many in every process.
        what: what they are.

    Returns:
        `[count · n, ...]`, in every process.
    """
    if count() == 1:
        return rows
    from jax.experimental import multihost_utils

    wait_for_all(what)
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Say on standard error what is waited for, if that takes long."""

    def tell() -> None:
        print(f"process {rank()} waits for the others: {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(SPEAK_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
