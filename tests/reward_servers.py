"""Servers on the loopback interface, good and bad, for the tests of rewards that ask elsewhere."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffusion_grpo import http_json
from diffusion_grpo.http_json import request
from diffusion_grpo.reward import wrap_reward
from diffusion_grpo.reward_server import RewardService, make_app


@contextlib.contextmanager
def serving(service: RewardService) -> Iterator[str]:
    """Run the real server in a thread; yields its URL."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def answering(handle: Callable[[str, bytes, Any], Any]) -> Iterator[str]:
    """Run a server of our own; yields its URL.

    `handle(path, body, handler)` returns what is sent as JSON, or (status, text, headers), or None
    if it has dealt with `handler` itself.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = handle(self.path, body, self)
            if answer is None:
                return
            if not isinstance(answer, tuple):
                answer = (200, json.dumps(answer), {})
            status, text, headers = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have given up
                self.wfile.write(text.encode())

        do_GET = do_POST = _answer

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pictures(count: int = 4, height: int = 8, width: int = 12) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def mean(images: Any, prompts: Any, metadata: Any) -> np.ndarray:
    """A score that depends on every pixel, the prompt and the metadata."""
    extra = [len(p) + m.get("k", 0) for p, m in zip(prompts, metadata, strict=True)]
    return images.mean(axis=(1, 2, 3)) + extra


def service(function: Any = mean, name: str = "mean", **options: Any) -> RewardService:
    return RewardService(wrap_reward(function, name=name), **options)


def post(url: str, body: Any, token: str = "") -> tuple[int, str]:
    """Post to a server; returns the status and what it said."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return 200, request(f"{url}/v1/score", data, token=token).decode()
    except http_json.RequestFailed as failure:
        status, _, said = str(failure).partition(": ")
        return int(status.removeprefix("status ")), said
