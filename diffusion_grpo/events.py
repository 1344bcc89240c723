"""What happened in a run and when: `events.jsonl`, one JSON object a line, only ever added to.

`time` (UTC, ISO 8601), `iteration` (how many were done) and `text`: that the run was begun,
resumed, ended or finished, and what it said meanwhile: evaluations, dropped groups, retries, the
drift of log-probs. Resuming takes nothing back, so that the iterations done twice can be seen.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import TypedDict

EVENTS_FILE = "events.jsonl"


class Event(TypedDict):
    """One line of the file."""

    time: str
    iteration: int
    text: str


def record_event(directory: Path, iteration: int, text: str) -> None:
    """Append one event; a disk that is full or a directory that is gone is told elsewhere.

    Args:
        directory: of the run.
        iteration: iterations done.
        text: what happened.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps(Event(time=now, iteration=iteration, text=text), ensure_ascii=False)
    with (
        contextlib.suppress(OSError),
        (directory / EVENTS_FILE).open("a+b") as file,
    ):
        if file.tell():  # a disk that was full may have cut the last line off
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write((line + "\n").encode())


def read_events(directory: str | Path) -> list[Event]:
    """Return a run's events in their order; a line that was cut off is left out.

    Args:
        directory: of the run.
    """
    path = Path(directory) / EVENTS_FILE
    if not path.is_file():
        return []
    events: list[Event] = []
    # Not `splitlines`: texts may hold characters that it takes for ends of lines.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events
