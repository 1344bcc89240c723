"""Ctrl-C and SIGTERM ask a run to stop where its state is whole, or can be had again as it was."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from diffusion_grpo.errors import Preempted
from diffusion_grpo.processes import exchange


def do_nothing() -> None:
    """Raise nothing: what is called again and again where nobody has asked for it."""


class StopNow(BaseException):
    """Raised where a run is to stop within an iteration, which is done anew when it is resumed.

    Attributes:
        request: whose `stopped` says what to raise once the state before it is saved.
    """

    def __init__(self, request: StopRequest) -> None:
        """Stop as `request` says."""
        super().__init__("asked to stop")
        self.request = request


class _Terminated(BaseException):
    """Raised by SIGTERM where no `StopRequest` heeds it; no `except Exception` holds it up."""


@contextlib.contextmanager
def preemptible(again: Callable[[], str]) -> Iterator[None]:
    """Turn SIGTERM into `Preempted` before a run heeds it by a `StopRequest`, and after.

    Left to itself it would end the process with a code that tells no scheduler to start it again,
    and a process that a container consists of would not notice it at all.

    Args:
        again: returns the command that goes on.

    Raises:
        Preempted: SIGTERM came; there was nothing to save.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        raise Preempted(f"stopped; go on with: {again()}") from None
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """A context in which the first SIGINT or SIGTERM sets `requested`; a second one stops at once.

    `preempted` says that it was SIGTERM: what a scheduler sends before it takes a machine away.
    Outside of the main thread, where Python has no signal handlers, it does nothing.
    Of several processes, any may be asked: `agreed` asks all.
    """

    def __init__(self) -> None:
        """Prepare; handlers are installed on entering."""
        self.requested = False
        self.preempted = False
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process is to stop; all of them learn the same at the same point."""
        said = exchange([self.requested, self.preempted], "whether to stop")
        asked, preempted = (any(flags) for flags in zip(*said, strict=True))
        if asked:  # else a signal that came in the meantime waits for the next time
            self.requested, self.preempted = True, preempted
        return asked

    def check(self) -> None:
        """Raise `StopNow` if any process is to stop; all have to come here as often."""
        if self.agreed():
            raise StopNow(self)

    def stopped(self, resume: str) -> BaseException:
        """Return what to raise once the state is saved: by SIGTERM `Preempted`, else as Ctrl-C."""
        told = f"stopped; go on with: {resume}"
        return Preempted(told) if self.preempted else KeyboardInterrupt(told)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self.requested = self._received = True
        self.preempted = number == signal.SIGTERM
        print("stopping: saving first what is done; once more to stop at once", file=sys.stderr)
