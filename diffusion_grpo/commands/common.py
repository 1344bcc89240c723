"""What the commands share: options, prompts, models, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import Prompt, load_prompts
from diffusion_grpo.refusals import refusals

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class Talk:
    """How much a command says on standard error: progress, and with `verbose` every setting.

    Args:
        quiet: says nothing but errors.
        verbose: says more.
        stream: the text stream; standard error by default.
    """

    quiet: bool = False
    verbose: bool = False
    stream: Any = None

    def __post_init__(self) -> None:
        """Refuse both at once."""
        if self.quiet and self.verbose:
            raise UsageError("--quiet and --verbose are opposites: give one of them")

    def say(self, text: str) -> None:
        """Say a line that everybody wants to know."""
        if not self.quiet:
            print(text, file=self.stream or sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Say a line for `--verbose`."""
        if self.verbose:
            self.say(text)

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Counter]:
        """Show how many of `total` are done, with rate and time left.

        A bar on a terminal; anywhere else, where it would fill a log, nothing but with --verbose.
        """
        stream = self.stream or sys.stderr
        bar = None
        if not self.quiet and stream.isatty():
            from rich import progress
            from rich.console import Console

            bar = progress.Progress(
                progress.TextColumn("{task.description} {task.completed}/{task.total}"),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=Console(file=stream),
                transient=True,
            )
        with bar or contextlib.nullcontext():
            counter = Counter(self, label, total, bar)
            yield counter
        self.detail(f"{label}: {counter.summary()}")


class Counter:
    """Counts what is done; called with the number done so far."""

    def __init__(self, talk: Talk, label: str, total: int, bar: Any) -> None:
        """Begin at 0."""
        self._label, self._total, self._bar, self._talk = label, total, bar, talk
        self._began, self._done = time.monotonic(), 0
        self._task = bar.add_task(label, total=total, rate="") if bar else None

    def __call__(self, done: int) -> None:
        """Show that `done` are done."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=self.rate())
        else:
            self._talk.detail(f"{self._label} {done}/{self._total}  {self.rate()}")

    def rate(self) -> str:
        """Return for example `3.2/s`."""
        return f"{self._done / max(1e-9, time.monotonic() - self._began):.3g}/s"

    def summary(self) -> str:
        """Return for example `16 in 4.8 s, 3.3/s`."""
        return f"{self._done} in {time.monotonic() - self._began:.1f} s, {self.rate()}"


def parse(kind: type[Options], words: Sequence[str], prog: str) -> Options:
    """Parse options with tyro.

    Raises:
        UsageError: what tyro refuses.
        SystemExit: with code 0, after `--help`.
    """
    with refusals():
        return tyro.cli(kind, args=list(words), prog=prog, config=(tyro.conf.FlagCreatePairsOff,))


def check_counts(options: Any, *names: str) -> None:
    """Raise a `UsageError` for an option that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")


def check_dtype(dtype: str) -> None:
    """Raise a `UsageError` for a compute dtype that does not exist."""
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype is {dtype!r}; expected float32 or bfloat16")


def read_prompts(
    texts: Sequence[str], source: str | None, limit: int | None = None
) -> list[Prompt]:
    """Return the prompts given as texts, or of a list; `@FILE` among the texts is a list too.

    Raises:
        UsageError: neither or both are given, or the list cannot be read.
    """
    if bool(texts) == (source is not None):
        raise UsageError("give the prompts by --prompt TEXT ..., or by --prompts NAME|FILE")
    if source is not None:
        return list(load_prompts(source)[:limit])
    found: list[Prompt] = []
    for text in texts:
        if not text.strip():
            raise UsageError("a prompt is empty; expected text")
        found += load_prompts(text[1:])[:limit] if text.startswith("@") else [Prompt(text)]
    return found[:limit]
