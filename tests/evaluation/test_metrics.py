"""Our numbers are pycocotools' own on the original json, to the last digit."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softteacher.data.coco import load_coco
from softteacher.detections import Detections
from softteacher.evaluation.metrics import KEYS, coco_metrics, coco_results
from tests.helpers import SHARED
from tests.samples import coco_tree, write_json


def original(path, results):
    """What pycocotools says about a results file, by its own route from file to numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        found = truth.loadRes(results)
        ev = COCOeval(truth, found, "bbox")
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    return ev


def invented(dataset, seed):
    """Detections around the truth: shifted boxes, some with a wrong class, some of nothing, many on crowds."""
    rng = np.random.default_rng(seed)
    found = {}
    for index, image in enumerate(dataset.images):
        rows = np.flatnonzero(dataset.annotations.image_index == index)  # crowd regions, too
        rows = np.repeat(rows, rng.integers(0, 4, len(rows)))
        box = (
            dataset.annotations.bbox[rows]
            + rng.normal(0, 0.06, (len(rows), 4)) * dataset.annotations.bbox[rows][:, [2, 3, 2, 3]]
        )
        box[:, 2:] += box[:, :2]
        labels = np.where(
            rng.random(len(rows)) < 0.85,
            dataset.annotations.labels[rows],
            rng.integers(0, len(dataset.categories), len(rows)),
        )
        noise = rng.random((rng.integers(0, 90), 4)) * 200
        noise[:, 2:] += noise[:, :2] + 5
        boxes = np.concatenate([box, noise]).astype(np.float32)
        scores = rng.random(len(boxes)) + (np.arange(len(boxes)) < len(box))
        labels = np.concatenate([labels, rng.integers(0, len(dataset.categories), len(noise))]).astype(np.int64)
        found[image.id] = Detections(boxes, (scores / 2).astype(np.float32), labels)
    return found


@pytest.mark.parametrize("name", ["coco80_mini", "cards", "voc07_8cls"])
def test_real_data(name):
    path = SHARED / "datasets" / name / "annotations" / "instances_val.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    dataset = load_coco(path)
    results = coco_results(dataset, invented(dataset, 0))
    ours, theirs = coco_metrics(dataset, results), original(path, results)
    assert {key: ours[key] for key in KEYS} == dict(zip(KEYS, theirs.stats.tolist(), strict=True))
    assert 0.1 < ours["AP"] < 0.9
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for n, (_, category) in enumerate(dataset.categories):
        values = precision[:, :, n]
        expected = float(values[values > -1].mean()) if (values > -1).any() else None
        assert ours["per_class"][category] == pytest.approx(expected, abs=1e-12)
    assert ours["AP"] == pytest.approx(np.mean([v for v in ours["per_class"].values() if v is not None]))


def truth(tmp_path):
    tree = coco_tree(4) | {"softteacher": {"root": "/nowhere"}}
    for row in tree["annotations"]:
        row |= {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
    tree["categories"].append({"id": 77, "name": "never there"})
    return tree, write_json(tmp_path / "a.json", tree)


def perfect(dataset, score=0.9, shift=0.0):
    found = {}
    for index, image in enumerate(dataset.images):
        boxes, labels = dataset.targets(index)
        found[image.id] = Detections(boxes + shift, np.full(len(boxes), score), labels)
    return found


@pytest.mark.parametrize(("shift", "ap", "ap50"), [(0.0, 1, 1), (0.5, None, 1), (30.0, 0, 0)])
def test_known_answers(tmp_path, shift, ap, ap50):
    _, path = truth(tmp_path)
    dataset = load_coco(path)
    metrics = coco_metrics(dataset, coco_results(dataset, perfect(dataset, shift=shift)))
    assert metrics["AP50"] == pytest.approx(ap50)
    if ap is None:
        assert 0.3 < metrics["AP"] < 0.9
    else:
        assert metrics["AP"] == pytest.approx(ap)
    assert metrics["APm"] == metrics["APl"] == -1  # no such boxes
    assert metrics["per_class"]["never there"] is None
    assert len(metrics["curve"]["0.5"]) == 101
    assert metrics["curve"]["0.5"][0] == pytest.approx(ap50)


def test_no_detections(tmp_path):
    _, path = truth(tmp_path)
    metrics = coco_metrics(load_coco(path), [])
    assert metrics["AP"] == metrics["AR100"] == 0
    assert metrics["per_class"]["cat"] == 0


def test_crowd_regions_swallow_what_lies_in_them(tmp_path):
    tree, _ = truth(tmp_path)
    for row in tree["annotations"]:
        if row["category_id"] == 2:
            row["iscrowd"] = 1
    dataset = load_coco(write_json(tmp_path / "b.json", tree))
    found = {
        image.id: Detections(np.array([[11.0, 3, 15, 9]]), np.array([0.9]), np.array([1])) for image in dataset.images
    }
    # inside a crowd region of their class: neither right nor wrong
    metrics = coco_metrics(dataset, coco_results(dataset, found))
    assert metrics["per_class"] == {"cat": 0, "dog": None, "never there": None}
    results = coco_results(dataset, found)
    assert metrics["AP"] == original(tmp_path / "b.json", results).stats[0]


def test_results_format(tmp_path):
    _, path = truth(tmp_path)
    dataset = load_coco(path)
    row = coco_results(
        dataset, {3: Detections(np.array([[1.23456, 2, 11.5, 4]]), np.array([0.1234567]), np.array([1]))}
    )
    assert row == [{"image_id": 3, "category_id": 2, "bbox": [1.23, 2.0, 10.27, 2.0], "score": 0.12346}]
    assert json.loads(json.dumps(row)) == row
