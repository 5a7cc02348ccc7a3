"""Answers as JSON, CSV, COCO and table."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from softteacher.choices import Format
from softteacher.data.coco import load_coco
from softteacher.serving.formats import write

CATEGORIES = [(3, "dark"), (7, 'a "white", [red] 方'), (9, "never seen")]


def answer(name: str, *found: tuple[int, list[float]]) -> dict[str, Any]:
    detections = [
        {"class": CATEGORIES[label][1], "category_id": CATEGORIES[label][0], "score": 0.75, "box": box}
        for label, box in found
    ]
    return {"image": f"x/{name}", "file_name": name, "width": 40, "height": 30, "detections": detections}


ANSWERS = [
    answer("a,1.jpg", (1, [1.5, 2, 11.5, 22]), (0, [0, 0, 40, 30])),
    {"image": "x/b.jpg", "file_name": "b.jpg", "error": "x/b.jpg: no image"},
    answer("sub/c.jpg"),
]


def written(answers: list[dict[str, Any]], form: Format) -> str:
    file = io.StringIO()
    write(iter(answers), file, form, lambda: CATEGORIES)
    return file.getvalue()


def test_json() -> None:
    assert json.loads(written(ANSWERS, "json")) == ANSWERS
    assert len(written(ANSWERS, "json").splitlines()) == len(ANSWERS) + 2
    assert json.loads(written([], "json")) == []


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(written(ANSWERS, "csv"))))
    assert [(r["image"], r["class"], r["score"], r["x1"], r["y2"], r["error"]) for r in rows] == [
        ("x/a,1.jpg", CATEGORIES[1][1], "0.75", "1.5", "22", ""),
        ("x/a,1.jpg", "dark", "0.75", "0", "30", ""),
        ("x/b.jpg", "", "", "", "", "x/b.jpg: no image"),
        ("x/sub/c.jpg", "", "", "", "", ""),
    ]
    assert rows[3]["width"] == "40"


def test_coco_is_a_data_set(tmp_path: Path) -> None:
    text = written(ANSWERS, "coco")
    tree = json.loads(text)
    assert tree["images"] == [
        {"id": 1, "file_name": "a,1.jpg", "width": 40, "height": 30},
        {"id": 2, "file_name": "sub/c.jpg", "width": 40, "height": 30},
    ]
    assert tree["annotations"][0] == {
        "id": 1, "image_id": 1, "category_id": 7, "bbox": [1.5, 2, 10, 20], "area": 200, "iscrowd": 0, "score": 0.75
    }  # fmt: skip
    (tmp_path / "found.json").write_text(text)
    dataset = load_coco(tmp_path / "found.json", root=str(tmp_path))
    assert dataset.categories == CATEGORIES
    assert dataset.targets(0)[0].tolist() == [[1.5, 2, 11.5, 22], [0, 0, 40, 30]]
    assert json.loads(written([], "coco"))["annotations"] == []


def test_table() -> None:
    text = written(ANSWERS, "table")
    for part in ("a,1.jpg", '"white", [red]', "0.750", "(not readable)", "(nothing)"):
        assert part in text


@pytest.mark.parametrize("form", ["json", "csv", "coco"])
def test_answers_are_written_as_they_come(form: Format) -> None:
    file = io.StringIO()

    def slowly() -> Any:
        yield ANSWERS[0]
        assert "a,1.jpg" in file.getvalue()
        yield ANSWERS[2]

    write(slowly(), file, form, lambda: CATEGORIES)
    assert "sub/c.jpg" in file.getvalue()
