"""Serve files over HTTP with range requests, and fail as a test specifies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = str | int | None
"""`cut` ends the connection in the middle, `whole` ignores the range; a number is a status."""


class Web:
    """Hold the state of a server.

    files: contents by path
    fault: what happens to request number n, from 0
    """

    def __init__(self, url: str):
        self.url = url
        self.files: dict[str, bytes] = {}
        self.fault: Callable[[int], Fault] = lambda number: None
        self.ranges: list[str] = []
        self.sent = 0


def _answer(web: Web, request: BaseHTTPRequestHandler) -> None:
    number = len(web.ranges)
    span = request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
    web.ranges.append(span)
    fault = web.fault(number)
    data = web.files.get(request.path.partition("?")[0].strip("/"))
    if data is None or isinstance(fault, int):
        request.send_error(fault if isinstance(fault, int) else 404)
        return
    first, _, last = span.partition("-")
    start, end = (0, len(data)) if fault == "whole" else (int(first), int(last or -2) + 1)
    end = len(data) if end < 0 else min(end, len(data))
    request.send_response(200 if fault == "whole" else 206)
    if fault != "whole":
        request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
    request.send_header("Content-Length", str(end - start))
    request.send_header("ETag", f'"{hash(data)}"')
    request.end_headers()
    body = data[start:end]
    body = body[: len(body) // 2] if fault == "cut" else body
    web.sent += len(body)
    request.wfile.write(body)


@contextmanager
def serving() -> Iterator[Web]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(web, self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web = Web(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
