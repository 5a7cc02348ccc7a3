"""The client: images in, `Detections` in their own pixels out, by a model that Triton serves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from softteacher.data.images import letterbox, load_image
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.serving.outputs import to_detections


class Client:
    """A model on a Triton server. It follows the model through deployments and rollbacks.

    Attributes:
        classes: names, in label order.

    Example:
        >>> with Client("http://localhost:8000", "cards") as client:   # doctest: +SKIP
        ...     found = client.predict(["table.jpg"])[0]
        ...     [client.classes[label] for label in found.labels]
    """

    def __init__(self, url: str, name: str, timeout: float = 30) -> None:
        """Connect and read how the model wants its images.

        Args:
            url: of Triton's HTTP service.
            name: of the model.
            timeout: seconds that one request may take.

        Raises:
            UserError: no Triton at the URL, or it has no such model.
        """
        self.url, self.name = url, name
        self._server = connect(url, timeout)
        try:
            self._read_config()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._server.close()

    def predict(self, images: Sequence[str | Path | Image.Image | np.ndarray]) -> list[Detections]:
        """Detect objects.

        Args:
            images: paths, `s3://` URIs, PIL images, or uint8 RGB arrays [H, W, 3].

        Returns:
            One for each image, in its own pixels, best score first (numpy arrays).

        Raises:
            UserError: an image can't be read, or Triton refuses or can't be reached.
        """
        found: list[Detections] = []
        while len(found) < len(images):
            batch = [_image(x) for x in images[len(found) : len(found) + self._max_batch]]
            found += self._predict_batch(batch)
        return found

    def _predict_batch(self, images: list[Image.Image], retry: bool = True) -> list[Detections]:
        prepared = [letterbox(image, self._size, self._short_side, self._long_side) for image in images]
        refusal = None
        try:
            answer, version = infer(self._server, self.url, self.name, np.stack([canvas for canvas, _ in prepared]))
        except UserError as e:
            refusal, version = e, ""
        if version != self._version and retry:
            # another version went live: it may want other input, or mean other classes
            self._read_config()
            return self._predict_batch(images, retry=False)
        if refusal:
            raise refusal
        return [
            to_detections(answer, i, scale, image.size)
            for i, (image, (_, scale)) in enumerate(zip(images, prepared, strict=True))
        ]

    def _read_config(self) -> None:
        with explained(self.url):
            if not self._server.is_model_ready(self.name):
                loaded = sorted(
                    {m["name"] for m in self._server.get_model_repository_index() if m.get("state") == "READY"}
                )
                there = f"it serves {', '.join(loaded)}" if loaded else "it serves none at present"
                raise UserError(f"Triton at {self.url} serves no model {self.name}; {there}")
            config = self._server.get_model_config(self.name)
        try:
            classes, how = (
                json.loads(config["parameters"][key]["string_value"]) for key in ("classes", "preprocessing")
            )
            self.classes = [str(c["name"]) for c in classes]
            self._size = (int(how["image_size"][0]), int(how["image_size"][1]))
            self._short_side, self._long_side = int(how["short_side"]), int(how["long_side"])
            self._max_batch = int(config["max_batch_size"])
            self._version = str(config["version_policy"]["specific"]["versions"][0])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.name} at {self.url} was not deployed by `softteacher deploy`: no classes in it"
            ) from None


def connect(url: str, timeout: float) -> Any:
    """A `tritonclient` for a Triton server; close it after use.

    Args:
        url: of Triton's HTTP service: `http://host:port`, `https://...`, or without a scheme.
        timeout: seconds that one request may take.

    Raises:
        UserError: there is no Triton.
    """
    import gevent.ssl  # type: ignore[import-untyped]
    import tritonclient.http

    scheme, _, host = url.rstrip("/").rpartition("://")
    if scheme not in {"", "http", "https"} or not host:
        raise UserError(f"{url}: not a URL of Triton; write http://host:port")
    with explained(url):
        server = tritonclient.http.InferenceServerClient(
            host,
            ssl=scheme == "https",
            ssl_context_factory=gevent.ssl.create_default_context,
            connection_timeout=min(timeout, 10),
            network_timeout=timeout,
        )
        if not server.is_server_live():
            server.close()
            raise UserError(f"{url}: what answers there is not a Triton server that is up; check the URL")
    return server


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
        result = server.infer(name, [request])
        response = result.get_response()
        return {o["name"]: result.as_numpy(o["name"]) for o in response["outputs"]}, str(response["model_version"])


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the errors of the connection and of Triton into one line that says what to do."""
    from geventhttpclient.response import HTTPParseError
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as e:
        raise UserError(f"Triton at {url} refused: {' '.join(str(e.message()).split())}") from e
    except TimeoutError as e:
        raise UserError(f"Triton at {url} did not answer in time; look at its log, or allow it more") from e
    except (OSError, HTTPParseError) as e:
        raise UserError(f"Triton at {url} can't be reached ({e}); check the URL, and that it runs") from e


def _image(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an array of {image.dtype} {list(image.shape)} is no image; give uint8 RGB [height, width, 3]")
    return Image.fromarray(np.ascontiguousarray(image))
