"""The client by both protocols against a real Triton: batches, bad input, faults."""

import contextlib
import http.server
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import trustme
from PIL import Image
from tritonclient.utils import InferenceServerException

from softteacher.errors import UserError
from softteacher.serving.client import Client
from softteacher.serving.connection import Unavailable
from tests.faulty import FaultyProxy
from tests.hand_server import HandServer
from tests.helpers import CATEGORIES, SIZE, square_image

BOX = (10, 20, 50, 44)
IMAGE = square_image(BOX)
NAMES = [c["name"] for c in CATEGORIES]


def test_all_protocols_give_the_same_in_order(hand_triton: HandServer) -> None:
    """20 images are three batches, of which two are on their way at a time."""
    images = [square_image((5 + i, 6 + i, 60 + i, 30 + i)) for i in range(20)]
    found = {}
    for protocol in ("http", "bare", "grpc"):
        with Client(hand_triton.url(protocol), "squares", concurrency=2) as client:
            assert client.classes == NAMES
            assert client.canary is None
            assert client.predict([]) == []
            found[protocol] = client.predict(images)
            assert client.predict(images[3:4])[0].boxes.tolist() == found[protocol][3].boxes.tolist()
        with pytest.raises(UserError, match="is closed"):
            client.predict(images)
    for i in range(20):
        for protocol, answers in found.items():
            assert answers[i].boxes.tolist() == [[5 + i, 6 + i, 60 + i, 30 + i]], protocol
            assert answers[i].scores.tolist() == [pytest.approx(0.6)]
            assert answers[i].labels.tolist() == [1]
            assert (answers[i].scores.dtype, answers[i].labels.dtype) == (np.float32, np.int64)


def test_only_a_few_batches_of_a_stream_are_in_memory(hand_triton: HandServer) -> None:
    taken = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(1)
            yield IMAGE

    with Client(hand_triton.urls.http, "squares", concurrency=2) as client:
        stream = client.stream(endless())
        for _ in range(20):
            assert next(stream).detections.boxes.tolist() == [[*BOX]]
        stream.close()
    assert len(taken) <= 20 + (2 + 2) * 8


def test_several_batches_are_on_their_way(hand_triton: HandServer) -> None:
    """Or Triton's batcher would have nothing to gather."""
    failures = []

    def ask() -> None:
        try:
            client.predict([IMAGE] * 64)
        except UserError as e:
            failures.append(str(e))

    with FaultyProxy(hand_triton.urls.http) as proxy, Client(proxy.url, "squares", timeout=3, concurrency=3) as client:
        proxy.seen.clear()
        proxy.always = "stall"
        thread = threading.Thread(target=ask)
        thread.start()
        until = time.monotonic() + 20
        while len(proxy.seen) < 3 and thread.is_alive():
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.3)
        assert proxy.seen == ["POST /v2/models/squares/infer"] * 3
        thread.join(20)
        assert not thread.is_alive()
    assert len(failures) == 1
    assert "did not answer in time" in failures[0]


def test_a_photograph_is_decoded_small_and_its_boxes_are_its_own(hand_triton: HandServer, tmp_path: Path) -> None:
    box = (1000, 700, 3000, 2200)
    photo = square_image(box, width=4000, height=3000)  # 12 megapixels, the input is 64 high
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=95)
    Image.fromarray(photo[:, :-1]).save(tmp_path / "odd.jpg", quality=95)  # can't be halved
    with Client(hand_triton.urls.grpc, "squares") as client:
        paths = [tmp_path / "photo.jpg", tmp_path / "odd.jpg"]
        small, odd = client.stream(paths, keep=True)
        whole, reduced = client.predict([photo, Image.open(tmp_path / "photo.jpg")])
        # an image that somebody has decoded at a reduced size counts by its own pixels
        half = client.predict([small.image])[0] if small.image else None
    assert small.image is not None
    assert small.image.size == (500, 375)
    assert small.size == (4000, 3000)
    assert odd.size == (3999, 3000)
    pixel = 3000 / 64
    for found in (small.detections, odd.detections, whole, reduced):
        np.testing.assert_allclose(found.boxes, [box], atol=pixel)
    assert half is not None
    np.testing.assert_allclose(half.boxes * 8, [box], atol=pixel)


def bad_jpeg(folder: Path) -> Path:
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 garbage")
    return folder / "bad.jpg"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: np.zeros((5, 5), np.uint8), r"uint8 \[5, 5\] is no image"),
        (lambda _: np.zeros((5, 5, 3), np.float32), "float32 .* is no image; give uint8 RGB"),
        (lambda _: np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\] is no image"),
        (lambda _: np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "20000 x 20000 pixels is absurdly large"),
        (lambda _: Image.new("RGB", (0, 7)), "0 x 7 pixels has nothing in it"),
        (lambda _: None, "NoneType is no image"),
        (bad_jpeg, "bad.jpg: (broken|no) image"),
        (lambda folder: folder / "missing.jpg", "missing.jpg: no such file"),
    ],
)
def test_a_bad_image_is_named_and_the_next_is_answered(
    make: Callable[[Path], Any], message: str, protocol: str, hand_triton: HandServer, tmp_path: Path
) -> None:
    with Client(hand_triton.url(protocol), "squares") as client:
        with pytest.raises(UserError, match=message):
            client.predict([IMAGE, make(tmp_path)])
        answers = list(client.stream([IMAGE, make(tmp_path), IMAGE]))
        assert [len(a.detections) for a in answers] == [1, 0, 1]
        assert [bool(a.error) for a in answers] == [False, True, False]
        with pytest.raises(UserError, match="takes a list"):
            client.predict(IMAGE)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_bad_requests_leave_the_server_healthy(module: Any, hand_triton: HandServer) -> None:
    url = hand_triton.urls.http if module is tritonclient.http else hand_triton.urls.grpc
    connection = module.InferenceServerClient(url.split("://")[1])

    def ask(images: np.ndarray, kind: str = "UINT8") -> Any:
        request = module.InferInput("images", list(images.shape), kind)
        request.set_data_from_numpy(images)
        return connection.infer("squares", [request]).as_numpy("detection_boxes")[0, 0].tolist()

    for images, kind, message in (
        (np.zeros((1, 10, 10, 3), np.uint8), "UINT8", "unexpected shape"),
        (np.zeros((1, *SIZE, 3), np.float32), "FP32", "expects 'UINT8'"),
        (np.zeros((0, *SIZE, 3), np.uint8), "UINT8", "size mismatch|batch"),
        (np.zeros((9, *SIZE, 3), np.uint8), "UINT8", "batch-size must be <= 8"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            ask(images, kind)
        assert ask(IMAGE[None]) == [*BOX]
    connection.close()


@pytest.mark.parametrize("fault", ["reset", "503", "truncate", "answer lost", "reset in the body"])
def test_what_may_pass_is_asked_again(fault: str, hand_triton: HandServer) -> None:
    with FaultyProxy(hand_triton.urls.http) as proxy, Client(proxy.url, "squares") as client:
        proxy.seen.clear()
        proxy.faults += [fault, fault]
        assert client.predict([IMAGE])[0].boxes.tolist() == [[*BOX]]
        assert len(proxy.seen) == 3


def test_what_stays_wrong_is_told(hand_triton: HandServer) -> None:
    with FaultyProxy(hand_triton.urls.http) as proxy, Client(proxy.url, "squares", timeout=1) as client:
        proxy.seen.clear()
        proxy.faults.append("500")  # no fault that passes
        with pytest.raises(UserError, match=r"refused: <html>"):
            client.predict([IMAGE])
        assert [line for line in proxy.seen if "infer" in line] == ["POST /v2/models/squares/infer"]
        proxy.always = "503"
        with pytest.raises(UserError, match=r"can't answer at present \(HTTP 503"):
            client.predict([IMAGE])
        proxy.always = "stall"
        with pytest.raises(UserError, match="did not answer in time"):
            client.predict([IMAGE])
        proxy.always = ""
        assert client.predict([IMAGE])[0].boxes.tolist() == [[*BOX]]


class TlsRelay(socketserver.ThreadingTCPServer):
    """TLS in front of a server; certificates by an authority that is made up."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        self.authority = trustme.CA()
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        self.authority.issue_cert("127.0.0.1").configure_cert(self._context)
        host, port = upstream.partition("://")[2].split(":")
        self._upstream = host, int(port)
        super().__init__(("127.0.0.1", 0), None)  # type: ignore[arg-type]
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._context.wrap_socket(request, server_side=True) as inside:
            outside = socket.create_connection(self._upstream)
            threading.Thread(target=self._copy, args=(outside, inside), daemon=True).start()
            self._copy(inside, outside)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def handle_error(self, *_: object) -> None:
        """A client that doesn't trust us hangs up."""


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tls(protocol: str, hand_triton: HandServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TlsRelay(hand_triton.url(protocol)) as relay:
        url = f"{protocol}s://127.0.0.1:{relay.server_address[1]}"
        with pytest.raises(UserError, match=f"Triton at {url}.*(TLS fails|can't be reached).*(?i:certificate)"):
            Client(url, "squares", timeout=2)
        relay.authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        with Client(url, "squares") as client:
            assert client.predict([IMAGE])[0].boxes.tolist() == [[*BOX]]
        relay.shutdown()


def test_something_else_there() -> None:
    """A web server that has an answer to everything."""

    class Anything(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Anything) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(UserError, match="doesn't speak as Triton; check the URL"):
            Client(f"http://127.0.0.1:{web.server_port}", "squares")
        web.shutdown()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nothing_there(protocol: str, hand_triton: HandServer) -> None:
    with pytest.raises(
        Unavailable, match=rf"Triton at {protocol}://127.0.0.1:9 can't be reached \(.*\); check the URL"
    ):
        Client(f"{protocol}://127.0.0.1:9", "squares", timeout=0.5)
    with pytest.raises(UserError, match=r"serves no model unknown; it serves .*squares"):
        Client(hand_triton.url(protocol), "unknown")
    other = hand_triton.url("grpc" if protocol == "http" else "http").partition("://")[2]
    with pytest.raises(UserError, match=f"{protocol}://{other}"):
        Client(f"{protocol}://{other}", "squares", timeout=0.5)
    for url in ("ftp://x", "http://", "http://x:port", "grpc://", "grpc://x:99999", "http://[::1"):
        with pytest.raises(UserError, match="not a URL of Triton"):
            Client(url, "squares")
