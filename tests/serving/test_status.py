"""`status` where no Triton is needed: a wrong URL of the metrics is a note."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from softteacher.errors import UserError
from softteacher.serving.status import status


@pytest.mark.parametrize("url", ["http://localhost:abc", "localhost:99999", "http://localhost:-1", "http://[::1"])
def test_a_wrong_url_of_triton_is_a_note(url: str, tmp_path: Path) -> None:
    assert f"{url}: not a URL of Triton; write http://host:port" in status(str(tmp_path), url, "cards")["notes"]


def test_what_can_not_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/nowhere/typo: no such folder"):
        status("/nowhere/typo", "http://127.0.0.1:9", "cards")
    with pytest.raises(UserError, match=r"--name cards\.v2: only letters"):
        status(str(tmp_path), "http://127.0.0.1:9", "cards.v2")


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
