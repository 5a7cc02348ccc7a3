"""Answers about images as a table, JSON, CSV or a COCO json. All but the table are written as the answers come."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from softteacher.choices import Format

Categories = Callable[[], Iterable[tuple[int, str]]]

COLUMNS = ("image", "width", "height", "class", "score", "x1", "y1", "x2", "y2", "error")


def write(answers: Iterable[dict[str, Any]], file: TextIO, form: Format, categories: Categories) -> None:
    """Write answers.

    `json` is a list with a line for each image. `csv` has a line for each detection, and one without a class for an
    image with none. `coco` is a COCO json with `score` as a further key of each annotation: tools that edit labels open
    it, and its annotations are also COCO results. It leaves out images that could not be read.

    Args:
        answers: from `softteacher.serving.predict`.
        file: text; it stays open.
        form: which of them.
        categories: (id, name) of the classes in label order; called after the last answer.
    """
    if form == "table":
        file.write(table(list(answers)))
    elif form == "json":
        before = "[\n"
        for answer in answers:
            file.write(before + json.dumps(answer))
            before = ",\n"
        file.write("\n]\n" if before != "[\n" else "[]\n")
    elif form == "csv":
        rows = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for answer in answers:
            for found in answer.get("detections") or [{"box": ()}]:
                rows.writerow(answer | found | dict(zip(COLUMNS[5:9], found["box"], strict=False)))
    else:
        _write_coco(answers, file, categories)


def table(answers: list[dict[str, Any]]) -> str:
    """The answers as a table for people."""
    grid = Table("image", "class", "score", "x1", "y1", "x2", "y2")
    for answer in answers:
        nothing = {"class": "(not readable)" if "error" in answer else "(nothing)", "score": None, "box": [""] * 4}
        for n, row in enumerate(answer.get("detections") or [nothing]):
            score = "" if row["score"] is None else f"{row['score']:.3f}"
            name = PurePosixPath(answer["image"]).name if n == 0 else ""
            grid.add_row(name, row["class"], score, *(str(v) for v in row["box"]))
    console = Console(width=100, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()


def _write_coco(answers: Iterable[dict[str, Any]], file: TextIO, categories: Categories) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as annotations:  # they come after all images
        file.write('{"images": [')
        images = boxes = 0
        for answer in answers:
            if "error" in answer:
                continue
            images += 1
            keys = ("file_name", "width", "height")
            file.write(",\n" * (images > 1) + json.dumps({"id": images, **{key: answer[key] for key in keys}}))
            for found in answer["detections"]:
                boxes += 1
                x1, y1, x2, y2 = found["box"]
                width, height = round(x2 - x1, 2), round(y2 - y1, 2)
                row = {
                    "id": boxes,
                    "image_id": images,
                    "category_id": found["category_id"],
                    "bbox": [x1, y1, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "score": found["score"],
                }
                annotations.write(",\n" * (boxes > 1) + json.dumps(row))
        file.write('],\n"annotations": [')
        annotations.seek(0)
        shutil.copyfileobj(annotations, file)
        file.write(f'],\n"categories": {json.dumps([{"id": i, "name": name} for i, name in categories()])}}}\n')
