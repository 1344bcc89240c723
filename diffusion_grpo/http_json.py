"""JSON over HTTP for rewards that ask elsewhere: deadlines, size limits, retries with back-off.

Built on the standard library. Proxies of the environment are used; redirects are not followed, so
that a token goes nowhere but to the server it is for.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from diffusion_grpo.errors import RewardError
from diffusion_grpo.reward_protocol import RETRY_STATUSES

FIRST_PAUSE_SECONDS = 0.5  # doubled from attempt to attempt
MAX_PAUSE_SECONDS = 30.0
_CHUNK = 64 * 1024

_T = TypeVar("_T")

pause = time.sleep


class RequestFailed(RewardError):
    """A request got no usable answer.

    Attributes:
        temporary: whether another attempt may succeed.
        retry_after: seconds that the server asks to wait before, or None.
    """

    def __init__(self, message: str, *, temporary: bool, retry_after: float | None = None) -> None:
        """Keep the message for people and the advice for `attempt`."""
        super().__init__(message)
        self.temporary, self.retry_after = temporary, retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def request(
    url: str,
    body: bytes | None = None,
    *,
    token: str = "",
    timeout: float = 60.0,
    max_bytes: int = 16 * 2**20,
) -> bytes:
    """GET a URL, or POST JSON to it, and return the answer's body.

    Args:
        url: http or https.
        body: JSON to post; None for GET.
        token: sent as `Authorization: Bearer`, unless empty.
        timeout: seconds for the whole exchange.
        max_bytes: of the answer.

    Raises:
        RequestFailed: no connection, no whole answer in time, an answer that is too long, or a
            status other than 200; its text has what the server said.
    """
    headers = {"Accept": "application/json", "User-Agent": "diffusion-grpo"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if token:
        headers["Authorization"] = f"Bearer {token}"
    asked = urllib.request.Request(url, data=body, headers=headers)
    deadline = time.monotonic() + timeout
    try:
        with _OPENER.open(asked, timeout=timeout) as answer:
            return _read(answer, deadline, max_bytes)
    except urllib.error.HTTPError as error:
        with error:
            raise RequestFailed(
                f"status {error.code}: {_said(error)}",
                temporary=error.code in RETRY_STATUSES,
                retry_after=_seconds(error.headers.get("Retry-After")),
            ) from None
    except TimeoutError:
        raise RequestFailed(f"no answer within {timeout:g} s", temporary=True) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise RequestFailed(f"no answer within {timeout:g} s", temporary=True) from None
        raise RequestFailed(f"no connection ({error.reason})", temporary=True) from None
    except (http.client.HTTPException, OSError) as error:
        raise RequestFailed(
            f"the connection broke ({type(error).__name__}: {error})", temporary=True
        ) from None


def _read(answer: Any, deadline: float, max_bytes: int) -> bytes:
    """Read a body; the socket's own timeout counts anew for every piece, the deadline does not."""
    pieces, size = [], 0
    while piece := answer.read1(_CHUNK):
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise RequestFailed(f"an answer of more than {max_bytes} bytes", temporary=False)
        if time.monotonic() > deadline:
            raise TimeoutError
    expected = answer.headers.get("Content-Length")
    if expected is not None and size < int(expected):
        raise http.client.IncompleteRead(b"".join(pieces), int(expected) - size)
    return b"".join(pieces)


def _said(error: urllib.error.HTTPError) -> str:
    """Return the text of an error answer: its `error`, or the begin of its body."""
    try:
        body = error.read(4096)
    except (http.client.HTTPException, OSError):
        return error.reason or "no reason given"
    text = body.decode("utf-8", "replace").strip()
    try:
        said = json.loads(text)["error"]
        said = said["message"] if isinstance(said, dict) else said
        return str(said)
    except (ValueError, KeyError, TypeError):
        return text[:200] or str(error.reason)


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:  # the header may also be a date
        return None


def attempt(
    servers: Sequence[str], call: Callable[[str], _T], *, retries: int, first: int = 0
) -> _T:
    """Call servers in turn until one answers.

    Args:
        servers: their URLs.
        call: what to do with one; raises `RequestFailed`.
        retries: attempts after the first; there is a pause, growing from 0.5 to 30 seconds, after
            every server has failed once more, or as long as the server asks for.
        first: the number of the server to begin with.

    Returns:
        What `call` returned.

    Raises:
        RequestFailed: every attempt failed, or one for good; the text names the server.
    """
    for number in range(retries + 1):
        server = servers[(first + number) % len(servers)]
        try:
            return call(server)
        except RequestFailed as failure:
            last = number == retries
            if last or not failure.temporary:
                tries = f" (the last of {number + 1} attempts)" if number else ""
                raise RequestFailed(
                    f"{server}: {failure}{tries}", temporary=failure.temporary
                ) from None
            rounds, place = divmod(number + 1, len(servers))
            seconds = FIRST_PAUSE_SECONDS * 2 ** (rounds - 1) if place == 0 else 0.0
            if failure.retry_after is not None and len(servers) == 1:
                seconds = failure.retry_after
            pause(min(seconds, MAX_PAUSE_SECONDS))
    raise AssertionError("unreachable: the last attempt returns or raises")
