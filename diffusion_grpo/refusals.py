"""What tyro refuses, as an error of ours: one line instead of a framed page and an exit."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

from diffusion_grpo.errors import UsageError


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn a refusal of the enclosed `tyro.cli` into a `UsageError`.

    Raises:
        UsageError: an option's own refusal, or tyro's in one line.
        SystemExit: with code 0, after `--help`.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        cause: BaseException | None = stop
        while cause is not None:  # an option's own refusal, without tyro's frame around it
            if isinstance(cause, UsageError):
                raise cause from None
            cause = cause.__context__
        raise UsageError(plain_text(complaint.getvalue())) from None


def plain_text(box: str) -> str:
    """Return the text of tyro's framed message as one line, without its title and footer."""
    text = re.sub(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]|-{3,}", " ", box)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s*(Argument helptext:|For full helptext).*$", "", text)
    return re.sub(r"^(Value error|Invalid choice|Missing argument|Unrecognized options) ", "", text)
