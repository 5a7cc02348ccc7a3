"""A proxy in front of an S3 server that does to requests what networks and overloaded stores do."""

import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on unchanged (the Host header too: it is signed), except for the faults.

    Attributes:
        faults: what happens to the next requests, one each; then nothing more.
        always: what happens to all others.
        seen: method and path of every request.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[str] = []
        self.always = ""
        self.seen: list[str] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients hang up on a server like this one."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.seen.append(f"{self.command} {self.path}")
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if fault in {"500", "503"}:
            return self._answer(int(fault), [], b"<html>" if fault == "500" else SLOW_DOWN)
        if fault == "reset":
            return self._reset()
        if fault == "corrupt upload":
            body = _flip(body)
        status, headers, answer = self._forward(body)
        if fault == "answer lost":
            return self._reset()
        if fault == "corrupt":
            answer = _flip(answer)
        if fault in {"truncate", "reset in the body", "stall"} and answer:
            self._answer(status, headers, answer[: len(answer) // 2], len(answer))
            if fault == "stall":
                self.server.closing.wait()
            if fault == "reset in the body":
                return self._reset()
            self.close_connection = True
            return None
        return self._answer(status, headers, answer)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"expect", "connection"}:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        keep = [(n, v) for n, v in response.getheaders() if n.lower() not in {"connection", "transfer-encoding"}]
        return response.status, keep, answer

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        if not any(n.lower() == "content-length" for n, _ in headers) and status != 304:
            headers = [*headers, ("Content-Length", str(len(body) if length is None else length))]
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def log_message(self, *_: object) -> None:
        """The tests look at `seen`."""


def _flip(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body
