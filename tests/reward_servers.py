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
