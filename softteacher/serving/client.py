"""The client: images in, `Detections` in their own pixels out, by a model that Triton serves."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from softteacher.data.images import MAX_PIXELS, as_rgb, load_image, original_size
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.serving.canary import CanaryReport, CanaryWatch
from softteacher.serving.connection import NotServed, Refused, Unavailable, open_connection, patiently
from softteacher.serving.connection import connect as connect
from softteacher.serving.connection import explained as explained
from softteacher.serving.connection import infer as infer
from softteacher.serving.served_model import OtherVersion, ServedModel
from softteacher.watching.recorder import TrafficRecorder

ImageLike = str | Path | Image.Image | np.ndarray

START_PATIENCE = 3.0  # seconds that a server may be away at the start: more likely the URL is wrong
PICTURE_SIDE = 1600  # pixels, the most that a kept image has


@dataclass(frozen=True)
class Answer:
    """What became of one image.

    Attributes:
        detections: in the pixels of the original image, best score first (numpy); none with an error.
        categories: (id, name) in label order, of the version that answered.
        size: width and height of the original image, pixels.
        image: the image, if it was to be kept; perhaps at a reduced size.
        error: why it could not be read.
    """

    detections: Detections
    categories: tuple[tuple[int, str], ...] = ()
    size: tuple[int, int] = (0, 0)
    image: Image.Image | None = None
    error: UserError | None = None


class Client:
    """A model on a Triton server. It follows the model through deployments and rollbacks. Threads may share it.

    While a candidate is deployed beside the model (`softteacher deploy --canary`), a share of the requests goes to
    both, and the candidate's answer is the one that is returned, unless it fails.

    Attributes:
        url: of Triton.
        name: of the model.

    Example:
        >>> with Client("http://localhost:8000", "cards") as client:   # doctest: +SKIP
        ...     found = client.predict(["table.jpg"])[0]
        ...     [client.classes[label] for label in found.labels]
    """

    def __init__(
        self,
        url: str,
        name: str,
        timeout: float = 30,
        *,
        concurrency: int = 4,
        canary_poll: float = 30,
        seed: int | None = None,
        recorder: TrafficRecorder | None = None,
    ) -> None:
        """Connect and read how the model wants its images.

        Args:
            url: of Triton: `http://host:port`, `https://`, `grpc://`, `grpcs://` (gRPC with TLS); `host:port` is HTTP.
            name: of the model.
            timeout: seconds that one request may take, with all that is asked again.
            concurrency: requests of one call that are on their way at a time.
            canary_poll: seconds between looks for a candidate.
            seed: of the draw which requests go to a candidate, too; none: another in every run.
            recorder: counts the live model's answers, for `softteacher watch`; the caller closes it.

        Raises:
            UserError: no Triton at the URL, or it has no such model.
        """
        if not timeout > 0 or concurrency < 1:
            raise UserError(f"timeout {timeout} and concurrency {concurrency}: must be more than 0")
        self.url, self.name = url, name
        self._timeout, self._concurrency, self._closed = timeout, concurrency, False
        self._server = open_connection(url)
        self._refreshing, self._recorder = threading.Lock(), recorder
        self._canary = CanaryWatch(self._server, url, name, canary_poll, seed)
        try:
            self._model = patiently(self._first_look, timeout, patience=START_PATIENCE)
            self._canary.look()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._server.close()

    @property
    def classes(self) -> list[str]:
        """Names in label order, of the version that is live as far as the client knows."""
        return self._model.classes

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(id, name) in label order, as `classes`."""
        return self._model.categories

    @property
    def canary(self) -> CanaryReport | None:
        """How the candidate did so far, also after it has gone; none if there never was one."""
        return self._canary.report

    def predict(self, images: Iterable[ImageLike]) -> list[Detections]:
        """Detect objects.

        Args:
            images: paths, `s3://` URIs, PIL images, or uint8 RGB arrays [H, W, 3].

        Returns:
            One for each image, in its own pixels, best score first (numpy arrays).

        Raises:
            UserError: an image can't be read, or Triton refuses or can't be reached.
        """
        if isinstance(images, ImageLike) and getattr(images, "ndim", 0) != 4:
            raise UserError("predict takes a list of images; write predict([image])")
        images, found = list(images), []
        one = len(images) <= self._model.max_batch
        for answer in self._answer(images, keep=False) if one else self.stream(images):
            if answer.error:
                raise answer.error
            found.append(answer.detections)
        return found

    def stream(self, images: Iterable[ImageLike], *, keep: bool = False) -> Iterator[Answer]:
        """Detect objects in any number of images, of which only a few batches are in memory at a time.

        Args:
            images: as for `predict`; taken as they are needed.
            keep: let the answers hold the images, at most `PICTURE_SIDE` pixels long.

        Yields:
            An answer for each image, in order; an image that can't be read is an answer with an error.

        Raises:
            UserError: Triton refuses or can't be reached.
        """
        source, pool = iter(images), ThreadPoolExecutor(self._concurrency)
        waiting: deque[Future[list[Answer]]] = deque()
        try:
            while batch := list(islice(source, self._model.max_batch)):
                waiting.append(pool.submit(self._answer, batch, keep))
                if len(waiting) > self._concurrency:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, sources: list[ImageLike], keep: bool) -> list[Answer]:
        """One request: read, ask, ask the candidate if it is its turn."""
        if self._closed:
            raise UserError(f"the client of {self.name} is closed; make a new one")
        candidate = self._canary.draw()
        model, opened = self._model, self._open(sources, candidate)

        def attempt(until: float) -> tuple[list[Detections], float]:
            nonlocal model, opened
            if self._model is not model:  # another version: it may want larger images
                model, opened = self._model, self._open(sources, candidate)
            started = time.monotonic()
            try:
                return model.ask(self._server, _good(opened), until), time.monotonic() - started
            except OtherVersion:
                self._refresh(model, until)
                raise
            except Refused as e:
                # perhaps because another version, which wants other input, is live by now
                if self._refresh(model, until) == model:
                    raise
                raise OtherVersion(str(e)) from e

        live: list[Detections] = []
        if _good(opened):
            until = time.monotonic() + self._timeout
            live, seconds = patiently(attempt, self._timeout, Unavailable, NotServed)
            if self._recorder:
                for image, detections in zip(_good(opened), live, strict=True):
                    self._recorder.add(detections, original_size(image), model.version, model.classes)
            if candidate:
                live = self._canary.ask(candidate, _good(opened), model, live, seconds, until) or live
        found = iter(live)
        return [
            Answer(Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)), error=x)
            if isinstance(x, UserError)
            else Answer(next(found), model.categories, original_size(x), _small(x) if keep else None)
            for x in opened
        ]

    def _open(self, sources: list[ImageLike], candidate: ServedModel | None) -> list[Image.Image | UserError]:
        short_side = max(m.short_side for m in (self._model, candidate) if m)
        opened: list[Image.Image | UserError] = []
        for source in sources:
            try:
                opened.append(_image(source, short_side))
            except UserError as e:
                opened.append(e)
        return opened

    def _first_look(self, until: float) -> ServedModel:
        try:
            if self._server.live(until - time.monotonic()):
                return ServedModel.read(self._server, self.url, self.name, until - time.monotonic())
        except NotServed:
            loaded = self._server.served(until - time.monotonic())
            there = f"it serves {', '.join(loaded)}" if loaded else "it serves none at present"
            raise UserError(f"Triton at {self.url} serves no model {self.name}; {there}") from None
        raise UserError(f"{self.url}: what answers there is not a Triton server that is up; check the URL")

    def _refresh(self, seen: ServedModel, until: float) -> ServedModel:
        """Read the config again, unless another thread has done it since `seen` was current."""
        with self._refreshing:
            if self._model is seen:
                model = ServedModel.read(self._server, self.url, self.name, until - time.monotonic())
                if model != seen:
                    self._model = model
            return self._model


def _image(image: ImageLike, short_side: int) -> Image.Image:
    """Decoded as RGB; a JPEG file at no more pixels than a model of this short side needs."""
    if isinstance(image, str | Path):
        return load_image(image, short_side)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = list(image.shape)
            raise UserError(f"an array of {image.dtype} {shape} is no image; give uint8 RGB [height, width, 3]")
        height, width = image.shape[:2]
    elif isinstance(image, Image.Image):
        width, height = image.size
        if not width or not height:
            raise UserError(f"an image of {width} x {height} pixels has nothing in it")
    else:
        raise UserError(f"{type(image).__name__} is no image; give a path, a PIL image or an array")
    if width * height > MAX_PIXELS:
        raise UserError(f"an image of {width} x {height} pixels is absurdly large; scale it down")
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image))
    try:
        rgb = as_rgb(image).copy()
    except Exception as e:  # a file that Pillow reads only now may be broken in any way
        raise UserError(f"broken image ({(str(e) or type(e).__name__).splitlines()[0]})") from None
    rgb.info.clear()  # its own pixels are meant, also if it was once decoded at a reduced size
    return rgb


def _good(opened: list[Image.Image | UserError]) -> list[Image.Image]:
    return [x for x in opened if isinstance(x, Image.Image)]


def _small(image: Image.Image) -> Image.Image:
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return image
