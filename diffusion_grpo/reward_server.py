"""A server that computes a reward for others: `diffusion-grpo serve-reward`.

One reward a server, so that each can have an environment and a machine of its own. The protocol is
in `reward_protocol`. Encryption is left to a proxy in front of it.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffusion_grpo import __version__
from diffusion_grpo.errors import UsageError
from diffusion_grpo.installing import install_command
from diffusion_grpo.reward import LoadedReward, RewardError, RewardSet
from diffusion_grpo.reward_protocol import (
    INFO_PATH,
    OPENAPI_PATH,
    SCORE_PATH,
    Limits,
    ProtocolError,
    decode_request,
    openapi,
)

RETRY_AFTER_SECONDS = 1


class _Rejected(Exception):
    """An answer other than scores."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class RewardService:
    """What the server does, whatever serves it.

    Attributes:
        reward: what it computes.
        limits: of one request.
    """

    def __init__(
        self,
        reward: LoadedReward,
        *,
        token: str = "",
        limits: Limits | None = None,
        concurrency: int = 1,
        waiting: int = 16,
        body_timeout: float = 60.0,
    ) -> None:
        """Prepare the threads.

        Args:
            reward: what to compute.
            token: what clients have to send; empty for none.
            limits: of one request.
            concurrency: requests computed at once; above 1 the reward must be thread-safe.
            waiting: further requests that are kept waiting; more are turned away.
            body_timeout: seconds in which a request has to arrive.
        """
        self.reward, self.limits = reward, limits or Limits()
        self._rewards = RewardSet((reward,), (1.0,))
        self._token = token
        self._pool = ThreadPoolExecutor(concurrency, "reward")
        self._places = concurrency + waiting
        self._taken = 0
        self._body_timeout = body_timeout

    def authorize(self, header: str) -> None:
        """Refuse a request without the token, if there is one."""
        expected = f"Bearer {self._token}".encode()
        if self._token and not hmac.compare_digest(header.encode(), expected):
            raise _Rejected(401, "the token is missing or wrong", **{"WWW-Authenticate": "Bearer"})

    def info(self) -> dict[str, Any]:
        """Describe the reward."""
        most = self.reward.batch_size
        return {
            "name": self.reward.name,
            "of_group": self.reward.of_group,
            "batch_size": min(most or self.limits.images, self.limits.images),
        }

    def describe(self) -> dict[str, Any]:
        """Return the OpenAPI description."""
        return openapi(self.reward.name, __version__, token=bool(self._token))

    async def score(self, stream: Any, length: str | None) -> dict[str, Any]:
        """Receive a request and compute its scores, if there is a place for it."""
        if self._taken >= self._places:
            raise _Rejected(
                503,
                f"{self._taken} requests are being worked on or waiting; try again later",
                **{"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        self._taken += 1
        try:
            body = await self._receive(stream, length)
            loop = asyncio.get_running_loop()
            scores = await loop.run_in_executor(self._pool, self._compute, body)
            return {"scores": scores}
        finally:
            self._taken -= 1

    async def _receive(self, stream: Any, length: str | None) -> bytes:
        too_large = length is not None and length.isdigit() and int(length) > self.limits.bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout):
                # What is too large is read to its end and not kept: most clients read an answer
                # only when they have sent everything.
                async for piece in stream:
                    too_large = too_large or len(body) + len(piece) > self.limits.bytes
                    if not too_large:
                        body += piece
        except TimeoutError:
            if not too_large:
                raise _Rejected(
                    408, f"the body did not arrive within {self._body_timeout:g} s"
                ) from None
        if too_large:
            raise _Rejected(
                413,
                f"the body is larger than {self.limits.bytes} bytes; send fewer images at once",
            )
        return bytes(body)

    def _compute(self, body: bytes) -> list[float]:
        try:
            images, prompts, metadata = decode_request(body, self.limits)
        except ProtocolError as error:
            raise _Rejected(400, str(error)) from None
        group_size = len(images) if self.reward.of_group else None
        try:
            result = self._rewards(images, prompts, metadata, group_size=group_size)
        except (RewardError, UsageError) as error:
            mendable = isinstance(error, UsageError) or isinstance(error.__cause__, UsageError)
            raise _Rejected(422 if mendable else 500, str(error)) from error
        return result.scores[self.reward.name].astype(np.float64).tolist()


def make_app(service: RewardService) -> Any:
    """Return the service as an ASGI application.

    Raises:
        UsageError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise _missing() from None

    def endpoint(
        answer: Callable[[Request], Awaitable[Any]], *, public: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                if not public:
                    service.authorize(request.headers.get("authorization", ""))
                return JSONResponse(await answer(request))
            except _Rejected as rejected:
                return JSONResponse(
                    {"error": str(rejected)}, rejected.status, headers=rejected.headers
                )
            except ClientDisconnect:
                return Response(status_code=400)

        return handle

    async def info(request: Request) -> Any:
        return service.info()

    async def score(request: Request) -> Any:
        return await service.score(request.stream(), request.headers.get("content-length"))

    async def described(request: Request) -> Any:
        return service.describe()

    return Starlette(
        routes=[
            Route(INFO_PATH, endpoint(info), methods=["GET"]),
            Route(SCORE_PATH, endpoint(score), methods=["POST"]),
            Route(OPENAPI_PATH, endpoint(described, public=True), methods=["GET"]),
        ]
    )


def serve(service: RewardService, host: str, port: int, *, ready: Callable[[int], None]) -> None:
    """Serve until interrupted.

    Args:
        service: what to serve.
        host: address to listen on, of IPv4 or IPv6, or a name.
        port: up to 65535; 0 for any free one.
        ready: called with the port once it is open.

    Raises:
        UsageError: the extra `serve` is not installed, or the port cannot be opened.
    """
    app = make_app(service)
    try:
        import uvicorn
    except ImportError:
        raise _missing() from None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None
    with listening:
        ready(listening.getsockname()[1])
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=30)
        uvicorn.Server(config).run(sockets=[listening])


def _missing() -> UsageError:
    return UsageError(
        "serve-reward needs Starlette and uvicorn, which are not installed: "
        f"{install_command('serve')}"
    )
