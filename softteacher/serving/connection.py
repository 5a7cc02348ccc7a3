"""Triton by HTTP or gRPC: the few calls that a client needs, each failure as one line, and asking again.

`Unavailable` and `NotServed` are failures that may pass; any other `UserError` is final.
"""

from __future__ import annotations

import json
import math
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np
import tenacity

from softteacher.errors import UserError

T = TypeVar("T")

BACKOFF = 0.1  # seconds, the longest first wait; doubled up to 2 s
_MESSAGE_BYTES = 2**31 - 1  # gRPC's own limit is 4 MB, less than one batch
_PORTS = "HTTP and gRPC have different ports"


class Unavailable(UserError):
    """Triton can't be reached or can't answer at present; the same request may succeed later."""


class NotServed(UserError):
    """Triton serves no such model at present."""


class Refused(UserError):
    """Triton refuses the request itself."""


class Connection(Protocol):
    """A Triton server, by either protocol. Threads may share it.

    Every call takes the seconds it may last, and raises `Unavailable`, `NotServed` or another `UserError`.
    """

    def live(self, seconds: float) -> bool:
        """Whether a Triton server answers."""

    def served(self, seconds: float) -> list[str]:
        """Names of the models that are ready, sorted."""

    def config(self, name: str, seconds: float) -> dict[str, Any]:
        """The config of the live version of a model."""

    def infer(self, name: str, images: np.ndarray, seconds: float) -> tuple[dict[str, np.ndarray], str]:
        """The outputs for uint8 [b, H, W, 3] (see `softteacher.serving.export`), and the version that answered."""

    def close(self) -> None:
        """Close it."""


def open_connection(url: str) -> Connection:
    """A connection to a Triton server; nothing is asked yet.

    Args:
        url: `http://host:port`, `https://...`, `grpc://host:port`, `grpcs://...` (gRPC with TLS); `host:port` is HTTP.

    Raises:
        UserError: it is no such URL.
    """
    parts = split_url(url, "http", "https", "grpc", "grpcs")
    if parts.scheme.startswith("grpc"):
        return _Grpc(url, parts.netloc, tls=parts.scheme == "grpcs")
    return _Http(url, parts.geturl().rstrip("/"))


def split_url(url: str, *schemes: str) -> SplitResult:
    """The parts of a URL of Triton; `host:port` is HTTP.

    Args:
        url: what the user gave.
        schemes: that will do.

    Raises:
        UserError: it is no such URL.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        known = parts.scheme in schemes and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is no number, or too large, or half of an IPv6 address
        known = False
    if not known:
        forms = " or ".join(f"{scheme}://host:port" for scheme in ("http", "grpc") if scheme in schemes)
        raise UserError(f"{url}: not a URL of Triton; write {forms}")
    return parts


def patiently(action: Callable[[float], T], seconds: float, *passing: type[UserError], patience: float = math.inf) -> T:
    """What `action` returns, tried again with growing, random pauses while it fails by what may pass.

    Args:
        action: takes the time (`time.monotonic`) at which all has to be over; must be safe to repeat.
        seconds: for all tries together.
        passing: the failures that may pass; by default `Unavailable`.
        patience: seconds after which nothing is tried again.
    """
    until = time.monotonic() + seconds
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(passing or Unavailable),
        wait=tenacity.wait_random_exponential(multiplier=BACKOFF, max=20 * BACKOFF),
        stop=tenacity.stop_before_delay(min(seconds, patience)),
        reraise=True,
    )
    return retrying(action, until)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the errors of the connection and of Triton into one line that says what to do."""
    from geventhttpclient.response import HTTPParseError
    from tritonclient.utils import InferenceServerException
    from urllib3 import exceptions as http

    slow = f"Triton at {url} did not answer in time; look at its log, or allow it more"
    lost = f"Triton at {url} can't be reached (%s); check the URL, and that it runs"
    try:
        yield
    except InferenceServerException as e:
        status, message = str(e.status()).removeprefix("StatusCode."), " ".join(str(e.message()).split())
        if status in {"404", "NOT_FOUND"}:
            raise NotServed(f"Triton at {url} refused: {message}") from e
        if status == "DEADLINE_EXCEEDED":
            raise UserError(slow) from e
        if status == "UNAVAILABLE":
            raise Unavailable(lost % f"{message}; {_PORTS}" if "http1" in message else lost % message) from e
        if status in {"429", "502", "503", "504"}:
            raise Unavailable(f"Triton at {url} can't answer at present (HTTP {status}: {message}); try later") from e
        raise Refused(f"Triton at {url} refused: {message}") from e
    except http.SSLError as e:
        raise UserError(f"Triton at {url}: TLS fails ({e}); check its certificate, and SSL_CERT_FILE") from e
    except (http.ProtocolError, http.NewConnectionError, HTTPParseError) as e:
        raise Unavailable(lost % e) from e
    except (TimeoutError, http.TimeoutError) as e:
        raise UserError(slow) from e
    except (OSError, http.HTTPError) as e:
        raise Unavailable(lost % e) from e


def connect(url: str, timeout: float) -> Any:
    """A `tritonclient` for the administration of a Triton server, by HTTP; close it after use, in the same thread.

    Args:
        url: of Triton's HTTP service: `http://host:port`, `https://...`, or without a scheme.
        timeout: seconds that one request may take.

    Raises:
        UserError: there is no Triton.
    """
    import gevent.ssl  # type: ignore[import-untyped]
    import tritonclient.http

    parts = split_url(url, "http", "https")
    with explained(url):
        server = tritonclient.http.InferenceServerClient(
            (parts.netloc + parts.path).rstrip("/"),
            ssl=parts.scheme == "https",
            ssl_context_factory=gevent.ssl.create_default_context,
            connection_timeout=min(timeout, 10),
            network_timeout=timeout,
        )
        if not server.is_server_live():
            server.close()
            raise UserError(f"{url}: what answers there is not a Triton server that is up; check the URL")
    return server


def addresses(url: str) -> list[str]:
    """The URL with each address that its host has: one for each replica, where the host is a headless service.

    Just the URL if there is one address or none, and with https, where the certificate is for the name.

    Raises:
        UserError: it is no URL of Triton's HTTP service.
    """
    parts = split_url(url, "http", "https")
    if parts.scheme == "https":
        return [url]
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # connecting tells what is wrong
        return [url]
    # localhost has two addresses and is one server
    families: dict[int, set[str]] = {}
    for family, *_, address in found:
        families.setdefault(family, set()).add(str(address[0]))
    hosts = sorted(families.get(socket.AF_INET) or families.get(socket.AF_INET6, set()))
    if len(hosts) < 2:
        return [url]
    port = f":{parts.port}" if parts.port else ""
    return [f"http://{f'[{host}]' if ':' in host else host}{port}{parts.path}" for host in hosts]


def infer(server: Any, url: str, name: str, images: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    """One request to the live version.

    Args:
        server: from `connect`.
        url: what errors call it.
        name: of the model.
        images: uint8 [b, H, W, 3].

    Returns:
        The outputs (see `softteacher.serving.export`) and the version that answered.

    Raises:
        UserError: Triton refuses, or can't be reached.
    """
    import tritonclient.http

    request = tritonclient.http.InferInput("images", list(images.shape), "UINT8")
    request.set_data_from_numpy(images)
    with explained(url):
        return _http_answer(server.infer(name, [request]))


class _Http:
    """By urllib3: tritonclient's own HTTP connections belong to one thread and keep one time limit for ever.

    tritonclient still writes and reads the bodies.
    """

    def __init__(self, url: str, full: str) -> None:
        import urllib3

        self._url, self._base = url, urlsplit(full).path
        self._pool = urllib3.connection_from_url(full, maxsize=64, retries=False)

    def live(self, seconds: float) -> bool:
        with explained(self._url):
            url = f"{self._base}/v2/health/live"
            return self._pool.urlopen("GET", url, timeout=seconds, retries=False).status == 200

    def served(self, seconds: float) -> list[str]:
        def ready(answer: Any) -> list[str]:
            return sorted({row["name"] for row in json.loads(answer.data) if row.get("state") == "READY"})

        return self._call("POST", "repository/index", seconds, ready, b"{}")

    def config(self, name: str, seconds: float) -> dict[str, Any]:
        path = f"models/{quote(name, safe='')}/config"
        return self._call("GET", path, seconds, lambda answer: dict(json.loads(answer.data)))

    def infer(self, name: str, images: np.ndarray, seconds: float) -> tuple[dict[str, np.ndarray], str]:
        from tritonclient.http import InferenceServerClient, InferInput

        def outputs(answer: Any) -> tuple[dict[str, np.ndarray], str]:
            length = int(answer.headers["Inference-Header-Content-Length"])
            return _http_answer(InferenceServerClient.parse_response_body(answer.data, header_length=length))

        request = InferInput("images", list(images.shape), "UINT8")
        request.set_data_from_numpy(images)
        body, length = InferenceServerClient.generate_request_body([request])
        headers = {"Inference-Header-Content-Length": str(length)}
        return self._call("POST", f"models/{quote(name, safe='')}/infer", seconds, outputs, body, headers)

    def close(self) -> None:
        self._pool.close()

    def _call(
        self,
        method: str,
        path: str,
        seconds: float,
        read: Callable[[Any], T],
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> T:
        """What `read` makes of a good answer."""
        from tritonclient.utils import InferenceServerException

        with explained(self._url):
            answer = self._pool.urlopen(
                method, f"{self._base}/v2/{path}", body, headers, timeout=max(seconds, 1e-3), retries=False
            )
            try:
                if answer.status == 200:
                    return read(answer)
                message = json.loads(answer.data)["error"]
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                if answer.status == 200:
                    raise UserError(f"{self._url}: what answers there doesn't speak as Triton; check the URL") from e
                # something in between has answered
                message = answer.data[:200].decode(errors="replace") or "no reason given"
            raise InferenceServerException(message, status=str(answer.status))


class _Grpc:
    def __init__(self, url: str, host: str, tls: bool) -> None:
        import tritonclient.grpc

        self._url = url
        self._server = tritonclient.grpc.InferenceServerClient(
            host,
            ssl=tls,
            root_certificates=ssl.get_default_verify_paths().cafile,  # as HTTPS; gRPC itself trusts its own list only
            channel_args=[
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                # a restarted server is found again soon: by default gRPC waits up to two minutes
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    def live(self, seconds: float) -> bool:
        with explained(self._url):
            return bool(self._server.is_server_live(client_timeout=seconds))

    def served(self, seconds: float) -> list[str]:
        with explained(self._url):
            index = self._server.get_model_repository_index(as_json=True, client_timeout=seconds)
        return sorted({row["name"] for row in index.get("models", []) if row.get("state") == "READY"})

    def config(self, name: str, seconds: float) -> dict[str, Any]:
        with explained(self._url):
            answer = self._server.get_model_config(name, as_json=True, client_timeout=seconds)
        return dict(answer["config"])

    def infer(self, name: str, images: np.ndarray, seconds: float) -> tuple[dict[str, np.ndarray], str]:
        from tritonclient.grpc import InferInput

        request = InferInput("images", list(images.shape), "UINT8")
        request.set_data_from_numpy(images)
        with explained(self._url):
            result = self._server.infer(name, [request], client_timeout=max(seconds, 1e-3))
        response = result.get_response()
        return {o.name: result.as_numpy(o.name) for o in response.outputs}, response.model_version

    def close(self) -> None:
        self._server.close()


def _http_answer(result: Any) -> tuple[dict[str, np.ndarray], str]:
    response = result.get_response()
    return {o["name"]: result.as_numpy(o["name"]) for o in response["outputs"]}, str(response["model_version"])
