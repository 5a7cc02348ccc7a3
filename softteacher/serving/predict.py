"""`predict`: questions to the endpoint from the command line."""

from __future__ import annotations

import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.choices import Format, check_name
from softteacher.console import say, track
from softteacher.data.images import BadImage
from softteacher.detections import paste_masks
from softteacher.errors import MissingFile, UserError
from softteacher.evaluation.draw import draw
from softteacher.evaluation.shard import Shard
from softteacher.serving.client import Answer, Client
from softteacher.serving.formats import table as table
from softteacher.serving.formats import write
from softteacher.serving.sources import Source, find_sources
from softteacher.watching.recorder import TrafficRecorder

DRAWERS = 2  # threads that draw and store pictures


def predict(
    images: list[str], triton: str, name: str, out: str | None = None, score: float = 0.3
) -> list[dict[str, Any]]:
    """Detect objects in image files through Triton.

    Args:
        images: files, folders, globs, `s3://` URIs and prefixes, see `find_sources`.
        triton: URL, `http://host:port` or `grpc://host:port`.
        name: of the model.
        out: folder for pictures with boxes; none: no pictures.
        score: detections under it are left out.

    Returns:
        For each image `image`, `file_name` (its path below the folder that holds all), `width`, `height` and
        `detections`: `class`, `category_id`, `score`, `box` (xyxy, pixels of the image).

    Raises:
        UserError: an image can't be read, the endpoint can't answer, the name is none of a model, or a picture would
            replace one of the images.
    """
    check_name(name.removesuffix("-canary"))  # a model on trial can be asked by itself
    sources = find_sources(images)
    pictures = _pictures(sources, out)
    with Client(triton, name) as client:
        answers = list(_answers(client, sources, pictures, score))
    for answer in answers:
        if "error" in answer:
            raise UserError(answer["error"])
    return answers


def predict_files(
    images: list[str],
    triton: str,
    name: str,
    out: str | None = None,
    score: float = 0.3,
    *,
    form: Format = "table",
    output: str | None = None,
    record: str | None = None,
    shard: Shard | None = None,
    parts: Sequence[str] = (),
) -> None:
    """As `predict`, for any number of images: only a few of them are in memory, the answers are written as they come.

    Args:
        images: as for `predict`.
        triton: the same.
        name: the same.
        out: the same; a picture is stored as soon as it is drawn.
        score: the same.
        form: see `softteacher.serving.formats.write`.
        output: file for the answers, local or `s3://`, written whole at the end; none: standard output.
        record: folder or `s3://` prefix to count the answers in, for `softteacher watch`.
        shard: ask about this share of the images only; `form` must be `json`.
        parts: what all the shards wrote as JSON, to be written as one run would have; no image is looked at then, and
            Triton is asked for its classes only, where `form` is `coco`.

    Raises:
        UserError: the endpoint can't answer; a part is missing or broken, or a shard isn't to be written as JSON; a
            picture or the answers would replace one of the images, or `output` a part; it can't be written, which is
            known before anything is asked unless it comes up later; or, after everything else is done, some images
            could not be read.
    """
    check_name(name.removesuffix("-canary"))  # a model on trial can be asked by itself
    if shard and form != "json":
        raise UserError(f"--shard {shard.number}/{shard.of}: only JSON can be joined; add --format json --output FILE")
    if output and form == "table":
        raise UserError(f"--output {output}: a table is for the screen; add --format json, coco or csv")
    if parts and (out or record):
        raise UserError("--join writes the answers again, nothing else; give --out and --record to the shards")
    sources = find_sources(images)
    pictures = _pictures(sources, out)  # of all shards, which write into one folder
    if output and storage.place(output) in {storage.place(uri) for uri in (*(s.uri for s in sources), *parts)}:
        raise UserError(f"--output {output}: is one of the inputs, the answers would replace it; choose another file")
    if shard:
        sources = shard.share(sources)
    broken: list[str] = []

    def watched(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for answer in answers:
            if "error" in answer:
                if len(sources) == 1 and not shard:
                    raise UserError(answer["error"])
                broken.append(answer["error"])
            yield answer

    with ExitStack() as stack:
        # refused before anything is asked
        file = stack.enter_context(storage.output_file(output)) if output else None

        @cache
        def client() -> Client:
            """Triton, which only needs to run where it is asked: answers are joined without it."""
            recorder = stack.enter_context(TrafficRecorder(record, name)) if record else None
            return stack.enter_context(Client(triton, name, recorder=recorder))

        answers = watched(_joined(parts, sources) if parts else _answers(client(), sources, pictures, score))
        if file is None:
            # the name of a file need not be UTF-8; as in a file, its bytes are written as they are
            if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
                sys.stdout.reconfigure(errors="surrogateescape")
            write(answers, sys.stdout, form, lambda: client().categories)
        else:
            with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
                write(answers, text, form, lambda: client().categories)
        if not parts and client().canary:
            say(str(client().canary))
    if broken:
        raise UserError(f"{len(broken)} of {len(sources)} images could not be read; the first: {broken[0]}")


def _pictures(sources: list[Source], out: str | None) -> dict[str, str]:
    """Where the picture of each image goes, by the name of the image; nothing without `out`."""
    if not out:
        return {}

    names = {source.name for source in sources}
    originals = {storage.place(source.uri): source.uri for source in sources}
    pictures: dict[str, str] = {}
    for name in (source.name for source in sources):
        # a.png and a.jpg of one folder are two pictures
        picture = name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"
        while picture != name and picture in names:  # a.png.jpg is an image, too, and its picture keeps the name
            picture += ".jpg"
        pictures[name] = storage.join(out, picture)
        if original := originals.get(storage.place(pictures[name])):
            raise UserError(f"--out {out}: {original} is one of the images, a picture would replace it; choose another")
    return pictures


def _answers(client: Client, sources: list[Source], pictures: dict[str, str], score: float) -> Iterator[dict[str, Any]]:
    drawing: deque[tuple[dict[str, Any], Future[None] | None]] = deque()
    pool = ThreadPoolExecutor(DRAWERS)
    try:
        found = client.stream((source.uri for source in sources), keep=bool(pictures))
        for source, answer in zip(sources, track(found, "predict", len(sources)), strict=True):
            if answer.error:
                # a store that can't be reached is no fault of the image: the others would fail, too
                if storage.is_s3(source.uri) and not isinstance(answer.error, BadImage | MissingFile):
                    raise answer.error
                drawing.append(({"image": source.uri, "file_name": source.name, "error": str(answer.error)}, None))
            else:
                good = replace(answer, detections=answer.detections[answer.detections.scores >= score])
                picture = pool.submit(_picture, good, pictures[source.name]) if pictures else None
                drawing.append((_row(source, good), picture))
            while drawing and (len(drawing) > 2 * DRAWERS or drawing[0][1] is None):
                yield _drawn(*drawing.popleft())
        while drawing:
            yield _drawn(*drawing.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _joined(parts: Sequence[str], sources: list[Source]) -> Iterator[dict[str, Any]]:
    """The answers of all parts in the order of the images."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        try:
            found |= {answer["image"]: answer for answer in json.loads(storage.read_bytes(part))}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{part}: no JSON of `softteacher predict --format json`; run this shard again") from None
    missing = [source.uri for source in sources if source.uri not in found]
    if missing or len(found) > len(sources):
        odd = missing or sorted(set(found) - {source.uri for source in sources})
        raise UserError(f"{odd[0]}: is {'not in any' if missing else 'in a'} part; give the same images and all parts")
    return (found[source.uri] for source in sources)


def _row(source: Source, answer: Answer) -> dict[str, Any]:
    d = answer.detections
    return {
        "image": source.uri,
        "file_name": source.name,
        "width": answer.size[0],
        "height": answer.size[1],
        "detections": [
            {
                "class": answer.categories[label][1],
                "category_id": answer.categories[label][0],
                "score": round(value, 4),
                "box": [round(v, 1) for v in box],
            }
            for label, value, box in zip(d.labels.tolist(), d.scores.tolist(), d.boxes.tolist(), strict=True)
        ],
    }


def _picture(answer: Answer, target: str) -> None:
    """Draw on the image that the client kept, which may be smaller than the original, and store the picture."""
    image = answer.image
    assert image is not None
    scale = np.array([image.width / answer.size[0], image.height / answer.size[1]] * 2, np.float32)
    scaled = replace(answer.detections, boxes=answer.detections.boxes * scale)
    masks = () if scaled.masks is None else paste_masks(scaled, image.height, image.width)
    file = io.BytesIO()
    classes = [name for _, name in answer.categories]
    draw(image, scaled, classes, masks=list(masks)).save(file, "JPEG", quality=92)
    storage.write_bytes(target, file.getvalue())


def _drawn(row: dict[str, Any], picture: Future[None] | None) -> dict[str, Any]:
    if picture:
        picture.result()
    return row
