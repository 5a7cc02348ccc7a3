"""Which detections are right, and what the others are taken for."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softteacher.data.coco import CocoDataset, load_coco
from softteacher.evaluation.confusion import confusion


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """An x and a y in the first image, a crowd of y and an x in the second."""
    for name in "ab":
        Image.new("RGB", (100, 100)).save(tmp_path / f"{name}.png")
    images = [{"id": n, "file_name": f"{name}.png", "width": 100, "height": 100} for n, name in enumerate("ab", 1)]
    rows = [
        (1, 3, [10, 10, 20, 20], 0),
        (1, 7, [50, 50, 20, 20], 0),
        (2, 7, [0, 0, 60, 60], 1),
        (2, 3, [70, 70, 20, 20], 0),
    ]
    annotations = [
        {"id": n, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for n, (image, c, box, crowd) in enumerate(rows, 1)
    ]
    categories = [{"id": 3, "name": "x"}, {"id": 7, "name": "y"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(document))
    return load_coco(tmp_path / "set.json", str(tmp_path))


def result(image: int, category: int, box: list[int], score: float) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


RESULTS = [
    result(1, 3, [10, 10, 20, 20], 0.9),  # right
    result(1, 3, [50, 50, 20, 20], 0.8),  # the y is taken for an x
    result(1, 7, [80, 80, 10, 10], 0.7),  # nothing is there
    result(2, 7, [5, 5, 20, 20], 0.95),  # in the crowd
    result(1, 7, [51, 51, 20, 20], 0.6),  # right, but the y is taken
    result(1, 7, [0, 80, 5, 5], 0.2),  # nothing is there, and nobody says so
]


def test_confusion(dataset: CocoDataset):
    found = confusion(dataset, RESULTS)
    assert found["classes"] == ["x", "y", "background"]
    # the x of the second image was missed
    assert found["matrix"] == [[1, 0, 1], [1, 0, 0], [0, 2, 0]]


def test_roc_is_that_of_the_scores(dataset: CocoDataset):
    roc = confusion(dataset, RESULTS)["roc"]
    # right: .9, .6 (each class has its own objects here); wrong: .8, .7, .2
    at = {t: (f, r) for f, r, t in zip(roc["fpr"], roc["tpr"], roc["threshold"], strict=True)}
    expected = {
        1.0: (0, 0),
        0.9: (0, 0.5),
        0.8: (1 / 3, 0.5),
        0.65: (2 / 3, 0.5),
        0.6: (2 / 3, 1),
        0.2: (1, 1),
        0.0: (1, 1),
    }
    for threshold, point in expected.items():
        assert at[threshold] == pytest.approx(point, abs=1e-4)
    area = np.trapezoid(roc["tpr"], roc["fpr"])
    assert area == pytest.approx(4 / 6, abs=1e-3)  # of the six pairs right, wrong the right one is ahead in four


@pytest.mark.parametrize("results", [[], RESULTS[:1], RESULTS[2:3]])
def test_no_curve_without_both_kinds(dataset: CocoDataset, results):
    found = confusion(dataset, results)
    assert found["roc"] == {"fpr": [], "tpr": [], "threshold": []}
    assert np.sum(found["matrix"]) == 3 + (results == RESULTS[2:3])


def test_no_objects(dataset: CocoDataset):
    empty = dataset.select([])
    assert np.sum(confusion(empty, [])["matrix"]) == 0
