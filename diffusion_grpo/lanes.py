"""Programs that run at the same time on a CPU, whose cores a single one leaves idle.

XLA's CPU backend computes many convolutions on one thread (3×3 on 32 images of 16×16×64, forward
and both gradients, for one), and JAX starts the programs of a Python thread one after the other. So
the microbatches of an iteration are given to a few threads, each of which waits for its own. An
accelerator is filled by one program: there all stays on the caller's thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

from diffusion_grpo import processes
from diffusion_grpo.mesh import shards

_T = TypeVar("_T")

# Each lane holds the activations of a microbatch and a gradient of its own.
MOST = 4


def lanes() -> int:
    """Return how many programs run at once: on one CPU device one a core, up to `MOST`; else 1."""
    if jax.default_backend() != "cpu" or shards() > 1 or processes.count() > 1:
        return 1
    return min(MOST, cores())


def cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Lanes:
    """Runs calls of the same compiled programs, a few at a time.

    An object belongs to the programs that its calls run: it remembers that they are compiled. Until
    they are, the first call runs alone, since two threads would compile the same program twice.
    """

    def __init__(self) -> None:
        """Nothing has been compiled."""
        self._compiled = False

    def run(self, calls: Sequence[Callable[[], _T]]) -> Iterator[_T]:
        """Yield what the calls return, in their order.

        With one lane they run in the caller's thread, each as it is asked for, and what they return
        may still be on its way. A call that fails raises here, and those not begun are not run.

        Args:
            calls: independent of each other; they return arrays, or trees of them.
        """
        count = min(lanes(), len(calls))
        if count < 2:
            for call in calls:
                yield call()
            return
        rest = list(calls)
        if not self._compiled:
            yield jax.block_until_ready(rest.pop(0)())
            self._compiled = True
        settings = _Settings()

        def within(call: Callable[[], _T]) -> _T:
            with settings.entered():
                return jax.block_until_ready(call())

        with ThreadPoolExecutor(count, thread_name_prefix="lane") as pool:
            futures = [pool.submit(within, call) for call in rest]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()


class _Settings:
    """What JAX keeps for each thread by itself and compiles programs for, as the caller has it."""

    def __init__(self) -> None:
        self._mesh = jax.sharding.get_mesh()
        self._promotion = jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if not self._mesh.empty:
                stack.enter_context(jax.set_mesh(self._mesh))
            stack.enter_context(jax.numpy_dtype_promotion(self._promotion))
            yield
