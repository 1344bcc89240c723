"""`diffusion-grpo view`: a run's page, live, on the loopback interface."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import tyro

from diffusion_grpo.commands.common import parse
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import FOLDER
from diffusion_grpo.report import read_files, report_data, report_page

_SHEET = re.compile(r"/sheet/(\d+)/(\w+\.webp)")


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """Serve runs as a page that follows them while they train, to this machine alone."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories."""
    port: int = 8060
    """Of http://127.0.0.1; 0 takes a free one."""
    every: float = 5.0
    """Seconds between two looks for news."""


def run(words: Sequence[str]) -> list[Path]:
    """Serve until interrupted."""
    options = parse(ViewOptions, words, "diffusion-grpo view")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"port is {options.port}; expected 0 to 65535")
    if not 0 < options.every < math.inf:
        raise UsageError(f"every is {options.every}; expected a number above 0")
    server = make_server(options.runs, port=options.port, every=options.every)
    with server:
        host, port = server.server_address[:2]
        print(f"http://{host}:{port}/  (Ctrl-C stops)", file=sys.stderr, flush=True)
        server.serve_forever()
    return []


def make_server(
    run_dirs: Sequence[str], *, port: int = 0, every: float = 5.0
) -> http.server.ThreadingHTTPServer:
    """Return a server of the page on 127.0.0.1, not yet serving.

    Args:
        run_dirs: the runs.
        port: 0 takes a free one.
        every: seconds between two looks of the page for news.

    Raises:
        UsageError: a directory holds no run, or the port is taken.
    """
    report_data(run_dirs, live=every)  # refuses what is no run

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the browser has gone
                super().handle()

        def do_GET(self) -> None:  # noqa: N802  the name that http.server calls
            # A page of another site that resolves its own name to 127.0.0.1 is not answered.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):
                self.send_error(403)
                return
            path = urlsplit(self.path).path
            sheet = _SHEET.fullmatch(path)
            try:
                if path == "/":
                    self._send("text/html; charset=utf-8", report_page(run_dirs, live=every))
                elif path == "/data.json":
                    # Read before the data: what is written in between is news the next time.
                    tag = _tag(read_files(run_dirs))
                    if self._has(tag):
                        self._send_unchanged()
                        return
                    data = json.dumps(report_data(run_dirs, live=every), allow_nan=False)
                    self._send("application/json", data, tag)
                elif sheet and int(sheet[1]) < len(run_dirs):
                    file = Path(run_dirs[int(sheet[1])]) / FOLDER / sheet[2]
                    self._send("image/webp", file.read_bytes())
                else:
                    self.send_error(404)
            except FileNotFoundError:
                self.send_error(404)
            except UsageError as error:  # the run was deleted, or is being written
                # In the body: the status line would have to be Latin-1, which a path may not be.
                self.send_error(503, explain=str(error).splitlines()[0][:200])

        def _has(self, tag: str) -> bool:
            return self.headers.get("If-None-Match") == tag

        def _send_unchanged(self) -> None:
            self.send_response(304)
            self.end_headers()

        def _send(self, kind: str, body: str | bytes, tag: str = "") -> None:
            content = body.encode() if isinstance(body, str) else body
            tag = tag or _tag(content)
            if self._has(tag):
                self._send_unchanged()
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", tag)
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet: the terminal is the user's."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(
            f"port {port} cannot be served: {error.strerror}; choose another with --port, or 0"
        ) from None


def _tag(content: bytes | list[tuple[str, int, int]]) -> str:
    """Return the ETag of a body, or of what says which state of the files it is of."""
    data = content if isinstance(content, bytes) else repr(content).encode()
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
