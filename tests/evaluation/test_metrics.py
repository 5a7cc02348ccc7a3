"""Our numbers are those of pycocotools on the original json."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softteacher.data.coco import load_coco
from softteacher.detections import Detections
from softteacher.evaluation.metrics import KEYS, average_precision, coco_metrics, coco_results
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


def assert_equal_to_the_judge(dataset, path, results):
    ours, theirs = coco_metrics(dataset, results), original(path, results)
    assert {key: ours[key] for key in KEYS} == pytest.approx(dict(zip(KEYS, theirs.stats, strict=True)), abs=1e-9)
    assert average_precision(dataset, results) == pytest.approx(theirs.stats[0], abs=1e-9)
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for n, name in enumerate(dataset.classes):
        values = precision[:, :, n]
        expected = float(values[values > -1].mean()) if (values > -1).any() else None
        assert ours["per_class"][name] == pytest.approx(expected, abs=1e-9), name
    there = [n for n in range(len(dataset.classes)) if (precision[:, :, n] > -1).all()]
    for iou, n in (("0.5", 0), ("0.75", 5)):
        assert ours["curve"][iou] == pytest.approx(precision[n][:, there].mean(1), abs=5.1e-5)  # 4 digits
    return ours


@pytest.mark.parametrize("name", ["coco80_mini", "cards", "voc07_8cls"])
def test_real_data(name):
    path = SHARED / "datasets" / name / "annotations" / "instances_val.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    dataset = load_coco(path)
    ours = assert_equal_to_the_judge(dataset, path, coco_results(dataset, invented(dataset, 0)))
    assert 0.1 < ours["AP"] < 0.9
    assert ours["AP"] == pytest.approx(np.mean([v for v in ours["per_class"].values() if v is not None]))


def random_tree(rng, first, scatter):
    """Boxes of all sizes, crowds, areas other than the box, images and classes without any; ids from `first`."""
    images, classes, boxes = (int(rng.integers(*span)) for span in ((1, 13), (1, 7), (1, 90)))
    image_ids, category_ids = (first + np.cumsum(rng.integers(1, scatter + 1, n)) for n in (images, classes))
    size = np.exp(rng.uniform(np.log(4), np.log(400), (boxes, 2)))
    corner = rng.random((boxes, 2)) * (800 - size)
    rows = [
        {
            "id": int(n),
            "image_id": int(rng.choice(image_ids[: max(1, images - 1)])),
            "category_id": int(rng.choice(category_ids[: max(1, classes - 1)])),
            "bbox": [round(v, 2) for v in (*xy, *wh)],
            "area": float(np.prod(wh) * rng.uniform(0.3, 1.1)),
            "iscrowd": int(n != first and rng.random() < 0.15),
        }
        for n, xy, wh in zip(first + scatter * np.arange(boxes), corner.tolist(), size.tolist(), strict=True)
    ]
    return {
        "softteacher": {"root": "/nowhere"},
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 800, "height": 800} for i in image_ids.tolist()],
        "annotations": [rows[n] for n in rng.permutation(boxes)],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids.tolist()],
    }


@pytest.mark.parametrize(("first", "scatter"), [(1, 1), (1, 30), (0, 1), (-40, 3), (2**45, 9)])
@pytest.mark.parametrize("seed", range(8))
def test_random_data(tmp_path, seed, first, scatter):
    rng = np.random.default_rng([seed, abs(first), scatter])
    path = write_json(tmp_path / "a.json", random_tree(rng, first, scatter))
    dataset = load_coco(path)
    results = coco_results(dataset, invented(dataset, seed))
    digits = seed % 3  # few digits: many scores are equal
    results = [r | {"score": round(r["score"], digits) if digits else r["score"]} for r in results]
    assert_equal_to_the_judge(dataset, path, results)


def test_nothing_is_printed(tmp_path, capfd):
    path = write_json(tmp_path / "a.json", random_tree(np.random.default_rng(0), 0, 1))
    dataset = load_coco(path)
    assert "annotation id 0: COCO evaluation counts its box as never found" in capfd.readouterr().err
    coco_metrics(dataset, coco_results(dataset, invented(dataset, 0)))
    assert capfd.readouterr() == ("", "")


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
    dataset = load_coco(path)
    metrics = coco_metrics(dataset, [])
    assert metrics["AP"] == metrics["AR100"] == average_precision(dataset, []) == 0
    assert metrics["per_class"]["cat"] == 0
    nothing = coco_metrics(dataset.select([]), [])  # every image broken
    assert nothing["AP"] == nothing["curve"]["0.5"][0] == average_precision(dataset.select([]), []) == -1
    assert set(nothing["per_class"].values()) == {None}


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
    assert metrics["AP"] == pytest.approx(original(tmp_path / "b.json", results).stats[0], abs=1e-9)


def test_results_format(tmp_path):
    _, path = truth(tmp_path)
    dataset = load_coco(path)
    row = coco_results(
        dataset, {3: Detections(np.array([[1.23456, 2, 11.5, 4]]), np.array([0.1234567]), np.array([1]))}
    )
    assert row == [{"image_id": 3, "category_id": 2, "bbox": [1.23, 2.0, 10.27, 2.0], "score": 0.12346}]
    assert json.loads(json.dumps(row)) == row
