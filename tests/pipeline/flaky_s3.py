"""A proxy in front of an S3 server that fails, hangs, cuts off and forgets to answer, as chance says.

    with FlakyS3(endpoint, {"500": 0.1, "lost": 0.1}, seed=3) as flaky:
        os.environ["AWS_ENDPOINT_URL"] = flaky.url

It forwards requests as they are and signs nothing, so it fits servers that check no signatures, such as moto.
"""

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

FAULTS = ("500", "503", "hang", "reset", "late-reset", "half", "lost")
"""What can happen to a request: an error of the server; a request to slow down; no answer until the client has given
up; a connection that is cut before the server sees the request, after it has done it, or in the middle of the answer;
and no answer to a put or post that was done."""
_ERRORS = {"500": "InternalError", "503": "SlowDown", "404": "NoSuchUpload"}
"""Of these, ``404`` can only be planned: so answers a store that has completed an upload in parts and forgotten it."""
_HOP_BY_HOP = ("connection", "transfer-encoding", "content-length", "expect", "host", "keep-alive")


class FlakyS3:
    """Serves on loopback until its block ends.

    Args:
        endpoint: URL of the server behind.
        rates: how often each fault falls on a request, by name.
        seed: of where they fall.
        hang: seconds without an answer.
        without_condition: strip ``If-None-Match``, as a store does that ignores it.
    """

    def __init__(
        self,
        endpoint: str,
        rates: Mapping[str, float] | None = None,
        *,
        seed: int | str = 0,
        hang: float = 2.0,
        without_condition: bool = False,
    ) -> None:
        self.rates = dict(rates or {})
        self.hang, self.without_condition = hang, without_condition
        self.planned: list[tuple[str, str]] = []
        """Faults that fall before chance decides, each on the next ``METHOD path`` that its pattern finds."""
        self.counts: Counter[str] = Counter()
        """Faults by name, and ``requests`` in all."""
        self.writes: Counter[str] = Counter()
        """Puts and posts that the server did, by ``METHOD path``."""
        self._chance, self._lock = random.Random(seed), threading.Lock()
        behind = urllib.parse.urlsplit(endpoint)
        self._behind = (str(behind.hostname), behind.port or 80)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"flaky": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self, request: str) -> str:
        """The fault of a ``METHOD path``; empty for none."""
        with self._lock:
            self.counts["requests"] += 1
            fault = next((each for each in self.planned if re.search(each[0], request)), None)
            if fault is not None:
                self.planned.remove(fault)
            name = fault[1] if fault else self._draw(request)
            if name:
                self.counts[name] += 1
            return name

    def _draw(self, request: str) -> str:
        left = self._chance.random()
        for name, rate in self.rates.items():
            left -= rate if name != "lost" or request.startswith("P") else 0.0
            if left < 0:
                return name
        return ""

    @property
    def faults(self) -> int:
        """How many requests met a fault."""
        return sum(self.counts[name] for name in FAULTS)

    def forward(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        """Let the server do a request."""
        connection = http.client.HTTPConnection(*self._behind, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in _HOP_BY_HOP and not (self.without_condition and name.lower() == "if-none-match"):
                    connection.putheader(name, value)
            connection.putheader("Host", headers["Host"])
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if method in ("PUT", "POST") and answer.status < 300:
            with self._lock:
                self.writes[f"{method} {path}"] += 1
        length = answer.getheader("Content-Length") if method == "HEAD" else str(len(data))
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        return answer.status, [*kept, ("Content-Length", length or "0")], data


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    flaky: FlakyS3

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # whichever method
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.flaky.draw(f"{self.command} {self.path}")
        if fault == "reset":
            return self._cut()
        if fault == "hang":
            time.sleep(self.flaky.hang)
            return self._cut()
        if fault in _ERRORS:
            text = f"<Error><Code>{_ERRORS[fault]}</Code><Message>This is a test.</Message></Error>".encode()
            data = b"" if self.command == "HEAD" else text
            return self._answer(int(fault), [("Content-Length", str(len(data)))], data)
        status, headers, data = self.flaky.forward(self.command, self.path, dict(self.headers.items()), body)
        if fault in ("late-reset", "lost"):
            return self._cut()
        if fault == "half" and len(data) > 1:
            self._answer(status, headers, data[: len(data) // 2])
            return self._cut()
        return self._answer(status, headers, data)

    def _answer(self, status: int, headers: list[Any], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _cut(self) -> None:
        self.close_connection = True
        if self.connection.fileno() >= 0:  # a close that answers nothing more: a reset, not an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client gave up first
            super().handle()
