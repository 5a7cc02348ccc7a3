"""`predict`: questions to the endpoint from the command line."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table

from softteacher import storage
from softteacher.console import track
from softteacher.data.images import load_image
from softteacher.detections import paste_masks
from softteacher.errors import UserError
from softteacher.evaluation.draw import draw
from softteacher.serving.client import Client


def predict(
    images: list[str], triton: str, name: str, out: str | None = None, score: float = 0.3
) -> list[dict[str, Any]]:
    """Detect objects in image files through Triton.

    Args:
        images: paths or `s3://` URIs.
        triton: HTTP URL.
        name: of the model.
        out: folder for pictures with boxes, one `<name>.jpg` an image; none: no pictures.
        score: detections under it are left out.

    Returns:
        For each image `image` and `detections`: `class`, `score`, `box` (xyxy, pixels of the image).

    Raises:
        UserError: an image can't be read, or the endpoint can't answer.
    """
    pictures = [PurePosixPath(uri).stem + ".jpg" for uri in images]
    if out and len(set(pictures)) < len(pictures):
        raise UserError(f"--out {out}: two of the images have the same name; ask about them one after the other")
    loaded = [load_image(uri) for uri in images]
    answers = []
    with Client(triton, name) as client:
        found = [client.predict([image])[0] for image in track(loaded, "predict", len(loaded))]
        classes = client.classes
    found = [d[d.scores >= score] for d in found]
    if out:
        with storage.output_folder(out) as folder:
            for picture, image, d in zip(pictures, loaded, found, strict=True):
                masks = () if d.masks is None else paste_masks(d, image.height, image.width)
                draw(image, d, classes, masks=list(masks)).save(folder / picture, quality=92)
    for uri, d in zip(images, found, strict=True):
        rows = zip(d.labels.tolist(), d.scores.tolist(), d.boxes.tolist(), strict=True)
        answers.append({
            "image": uri,
            "detections": [
                {"class": classes[label], "score": round(value, 4), "box": [round(v, 1) for v in box]}
                for label, value, box in rows
            ],
        })  # fmt: skip
    return answers


def table(answers: list[dict[str, Any]]) -> str:
    """The answers as a table for people."""
    grid = Table("image", "class", "score", "x1", "y1", "x2", "y2")
    for answer in answers:
        rows = answer["detections"] or [{"class": "(nothing)", "score": None, "box": [""] * 4}]
        for n, row in enumerate(rows):
            score = "" if row["score"] is None else f"{row['score']:.3f}"
            name = PurePosixPath(answer["image"]).name if n == 0 else ""
            grid.add_row(name, row["class"], score, *(str(v) for v in row["box"]))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()
