"""One process at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path

from diffusion_grpo.errors import UsageError

LOCK_FILE = ".lock"


class RunLock:
    """A lock on a run directory; a context that holds it.

    The operating system lets go of it when the process ends, however it ends, so that none is ever
    left behind. Where the file system has no locks, a warning says so.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            UsageError: another process has it, or the file cannot be written.
        """
        path = directory / LOCK_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written ({error.strerror}); a run needs its directory for "
                "itself: choose another with --run.output"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                # Some shared file systems know no locks; a run on them has to do without.
                warnings.warn(
                    f"run directory {directory} cannot be locked ({error.strerror}): see to it "
                    "that no second process runs in it",
                    stacklevel=2,
                )
                self._descriptor: int | None = descriptor
                return
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UsageError(
                f"run directory {directory} is in use by {holder}; expected one process a run: "
                "wait for it, stop it, or choose another directory with --run.output"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor

    def __enter__(self) -> RunLock:
        """Return the lock itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
