"""A reward that a server computes: `--reward http://host:8000`, or several servers in turn."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.http_json import RequestFailed, attempt, request
from diffusion_grpo.reward_protocol import (
    INFO_PATH,
    SCORE_PATH,
    ProtocolError,
    decode_info,
    decode_scores,
    encode_request,
)
from diffusion_grpo.reward_specs import TOKEN_VARIABLE, split_servers


def server_reward(spec: str) -> Callable[..., ServerReward]:
    """Return the factory of the reward behind some servers.

    Args:
        spec: one URL, or several with commas between them, all of the same reward.
    """
    servers = split_servers(spec)

    def connect(
        timeout: float = 60.0,
        retries: int = 4,
        batch_size: int = 32,
        token_variable: str = TOKEN_VARIABLE,
        name: str = "",
    ) -> ServerReward:
        """Ask the servers what they are.

        Args:
            timeout: seconds for one request.
            retries: attempts after a first one that failed.
            batch_size: the most images of one request; fewer where a server finds it too large.
            token_variable: the environment variable with the token, if the servers want one.
            name: the name in the metrics, if not the one that the servers give.
        """
        for option, value, least in (("retries", retries, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise UsageError(f"reward {spec!r}: {option} is {value}; expected {least} or more")
        if not timeout > 0:
            raise UsageError(f"reward {spec!r}: timeout is {timeout}; expected more than 0 seconds")
        reward = ServerReward(
            servers, os.environ.get(token_variable, ""), timeout=timeout, retries=retries
        )
        reward.connect(token_variable, batch_size, name)
        return reward

    connect.is_reward_factory = True  # type: ignore[attr-defined]
    return connect


class ServerReward:
    """The reward behind one or more servers that keep the protocol of `reward_protocol`."""

    def __init__(self, servers: Sequence[str], token: str, *, timeout: float, retries: int) -> None:
        """Prepare; nothing is sent before `connect`."""
        self.servers = list(servers)
        self.timeout, self.retries = timeout, retries
        self.name, self.of_group = "", False
        self.images_at_once = 1
        self._token = token
        self._next = 0
        self._resting: dict[str, float] = {}

    def connect(self, token_variable: str, batch_size: int, name: str = "") -> None:
        """Ask every server what it is.

        Args:
            token_variable: where the token came from, for messages.
            batch_size: the most images of one request.
            name: the name in the metrics, if not the servers'.

        Raises:
            UsageError: one cannot be reached, refuses the token, or is not such a server, or they
                are different rewards.
        """
        told = {}
        for server in self.servers:
            try:
                body = request(f"{server}{INFO_PATH}", token=self._token, timeout=self.timeout)
                told[server] = decode_info(body)
            except RequestFailed as failure:
                mend = "is it running, and is its port right?"
                if str(failure).startswith("status 401"):
                    given = "is wrong" if self._token else "is not set"
                    mend = f"{token_variable} {given} in the environment"
                raise UsageError(f"reward server {server}: {failure}; {mend}") from None
            except ProtocolError as error:
                raise UsageError(
                    f"reward server {server} is not a reward server: GET {INFO_PATH}: {error}"
                ) from None
        if len({answer[:2] for answer in told.values()}) > 1:
            raise UsageError(
                "these servers are different rewards: "
                + ", ".join(f"{server} is {answer[0]!r}" for server, answer in told.items())
                + "; expected one reward, or name them as rewards of their own"
            )
        self.name, self.of_group, _ = next(iter(told.values()))
        self.name = re.sub(r"[\s/=]+", "_", name or self.name) or "server"
        self.images_at_once = min(size or batch_size for *_, size in told.values())
        self.images_at_once = min(self.images_at_once, batch_size)

    def __call__(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Score uint8 images [B, H, W, 3]; returns float32 [B].

        The images go out in pieces of `images_at_once` (a group is never cut), as many at once as
        there are servers. A piece that is too large for a server (status 413) is halved, and so
        are all that come after it. After a failure the servers change places, so that a call that
        is repeated begins with others.

        Raises:
            RequestFailed: a piece got no usable answer.
        """
        size = len(images) if self.of_group else self.images_at_once
        pieces = [slice(start, start + size) for start in range(0, len(images), size)]

        def score(number: int, piece: slice) -> np.ndarray:
            return self._score(number, images[piece], prompts[piece], metadata[piece])

        numbers = range(self._next, self._next + len(pieces))
        self._next = (self._next + len(pieces)) % len(self.servers)
        try:
            with ThreadPoolExecutor(len(self.servers), "reward-server") as pool:
                return np.concatenate(list(pool.map(score, numbers, pieces))).astype(np.float32)
        except RequestFailed:
            self._next = (self._next + 1) % len(self.servers)
            raise

    def _score(
        self, number: int, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Score a piece, in smaller ones where it has to be; returns float64 of its length."""
        scores, done = [], 0
        while done < len(images):
            size = len(images) if self.of_group else self.images_at_once
            part = slice(done, done + size)
            try:
                scores.append(self._ask(number, images[part], prompts[part], metadata[part]))
            except RequestFailed as failure:
                if failure.status != 413:
                    raise
                count = len(images[part])
                if self.of_group or count == 1:
                    what = "a group" if self.of_group else "one image"
                    raise RequestFailed(
                        f"{failure}; {what} cannot be divided: raise the server's limit "
                        "(serve-reward --max-megabytes)",
                        temporary=False,
                        status=413,
                    ) from None
                self.images_at_once = min(self.images_at_once, (count + 1) // 2)
                continue
            done += size
        return np.concatenate(scores)

    def _ask(
        self, number: int, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Have one request answered, beginning with the server of a number; returns float64 [B]."""
        body = encode_request(images, prompts, metadata)

        def ask(server: str) -> np.ndarray:
            url = f"{server}{SCORE_PATH}"
            answer = request(url, body, token=self._token, timeout=self.timeout)
            try:
                return decode_scores(answer, len(images))
            except ProtocolError as error:
                raise RequestFailed(f"a useless answer: {error}", temporary=True) from None

        return attempt(self.servers, ask, retries=self.retries, first=number, resting=self._resting)
