"""Files that are written: what a command is asked for, and what others may read meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion_grpo.errors import UsageError

# Of an `OSError`: the disk is full, or a quota is used up.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: Path, suffixes: Sequence[str]) -> Path:
    """Check that a file can be written, before any work is done for it.

    Raises:
        UsageError: its suffix is another, it is a folder, or its folder does not exist; it cannot
            be written.
    """
    path = path.expanduser()
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"output {str(path)!r} does not end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(
            f"output {str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder; expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"output {str(path)!r} cannot be written; choose another folder or name")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a text file by way of a second one, so that nobody reads half of it.

    The second file has a name of its own: another process may be writing the same file.

    Raises:
        OSError: it cannot be written.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `path` once all is written.

    So nobody takes half a folder, or one of two models, for a whole one: what was there before
    stays until then. Folders beside it, named `.tmp` and `.old`, may be left by a kill, and are
    removed by the next call.

    Args:
        path: a folder, there already or new.

    Raises:
        OSError: it cannot be written.
    """
    scratch, old = (path.with_name(f"{path.name}.{end}") for end in ("tmp", "old"))
    for left in (scratch, old):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if path.exists():
            os.rename(path, old)
        os.rename(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def emptied_on_failure(folder: Path) -> Iterator[None]:
    """Remove what was written into a new or empty folder if not all of it could be.

    So the next try finds the folder as this one did. The folder itself stays if it was there: it
    may be where a disk is mounted.
    """
    there = folder.exists()
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
