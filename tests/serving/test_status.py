"""`status` where no Triton is needed: a wrong URL of the metrics is a note."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from softteacher.serving.status import status


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0", ""),  # Triton's gRPC port: HTTP/2
        (b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nnv_", "IncompleteRead"),
        (None, "nonnumeric port"),
    ],
    ids=["gRPC", "torn", "no port"],
)
def test_what_is_no_page_of_metrics_is_told(answer: bytes | None, message: str, tmp_path: Path) -> None:
    class Port(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(answer or b"")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Port) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/metrics" if answer else "http://host:port/metrics"
        note = status(str(tmp_path), "http://127.0.0.1:9", "cards", url)["notes"][-1]
        server.shutdown()
    assert note.startswith(f"{url}: no metrics of Triton there (")
    assert message in note
