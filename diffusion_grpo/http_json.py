"""JSON over HTTP for rewards that ask elsewhere: deadlines, size limits, retries with back-off.

Built on the standard library. Proxies of the environment are used; redirects are not followed, so
that a token goes nowhere but to the server it is for.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from diffusion_grpo.errors import RewardError
from diffusion_grpo.reward_protocol import RETRY_STATUSES

FIRST_PAUSE_SECONDS = 0.5  # doubled from attempt to attempt
MAX_PAUSE_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 600.0  # a server that asks for more is asked again after so long
_CHUNK = 64 * 1024

_T = TypeVar("_T")

clock, pause = time.monotonic, time.sleep


class RequestFailed(RewardError):
    """A request got no usable answer.

    Attributes:
        temporary: whether another attempt may succeed.
        retry_after: seconds that the server asks to wait before, or None.
        status: of the answer, or None where there was none or its body was at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        temporary: bool,
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        """Keep the message for people and the advice for `attempt`."""
        super().__init__(message)
        self.temporary, self.retry_after, self.status = temporary, retry_after, status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Connection(http.client.HTTPConnection):
    """A connection that reads the answer of a server that did not wait for the whole body.

    One that finds a body too large may answer with 413 and hang up. To send the rest then fails,
    but what was answered is there to be read; if nothing was, reading fails as well.
    """

    def send(self, data: Any) -> None:
        connected = self.sock is not None
        try:
            super().send(data)
        except (BrokenPipeError, ConnectionResetError):
            if not connected:
                raise


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)


_OPENER = urllib.request.build_opener(_NoRedirect, _HTTP, _HTTPS)


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
                status=error.code,
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
    """Return the seconds of a Retry-After header, which may also be a date."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def attempt(
    servers: Sequence[str],
    call: Callable[[str], _T],
    *,
    retries: int,
    first: int = 0,
    resting: dict[str, float] | None = None,
) -> _T:
    """Call servers in turn until one answers.

    A server that failed for a passing reason has a pause: as long as it asks for, up to 10 minutes,
    or else 0.5 seconds, doubled with each of its failures up to 30. Meanwhile the others are
    called. One that failed with a status of 500 or more that does not pass, such as a reward that
    ran out of memory, is not called again, but each other server is, whatever `retries` is.

    Args:
        servers: their URLs.
        call: what to do with one; raises `RequestFailed`.
        retries: attempts after the first that failed for a passing reason.
        first: the number of the server to begin with.
        resting: server to the time of `clock` before which it asked not to be called. Calls that
            share it, from several threads too, honor what one of them was told.

    Returns:
        What `call` returned.

    Raises:
        RequestFailed: every attempt failed, or one for good; the text names each server that is
            given up, the last one last, and the other attributes are that one's.
    """
    resting = {} if resting is None else resting
    turns = [servers[(first + i) % len(servers)] for i in range(len(servers))]
    failures: Counter[str] = Counter()
    pausing: dict[str, float] = {}
    given_up: list[str] = []
    while True:
        now = clock()
        waits = {s: max(pausing.get(s, now), resting.get(s, now)) - now for s in turns}
        server = min(turns, key=lambda s: waits[s])
        if waits[server] > 0:
            if waits[server] > MAX_PAUSE_SECONDS:
                print(f"{server} asks to wait {waits[server]:.0f} s", file=sys.stderr)
            pause(waits[server])
        try:
            return call(server)
        except RequestFailed as failure:
            failures[server] += 1
            number = failures.total()
            of_this_server = not failure.temporary and (failure.status or 0) >= 500
            if of_this_server and len(turns) > 1:
                turns.remove(server)
                given_up.append(f"{server}: {failure}")
                continue
            if not failure.temporary or number - len(given_up) > retries:
                tries = f" (the last of {number} attempts)" if number > 1 else ""
                raise RequestFailed(
                    "; ".join([*given_up, f"{server}: {failure}{tries}"]),
                    temporary=failure.temporary,
                    retry_after=failure.retry_after,
                    status=failure.status,
                ) from None
            if failure.retry_after is not None:
                resting[server] = clock() + min(failure.retry_after, MAX_RETRY_AFTER_SECONDS)
            else:
                seconds = FIRST_PAUSE_SECONDS * 2 ** (failures[server] - 1)
                pausing[server] = clock() + min(seconds, MAX_PAUSE_SECONDS)
            turns.remove(server)
            turns.append(server)
