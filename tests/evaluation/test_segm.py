"""AP of masks: our numbers are those of pycocotools, and reports show them."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as judge
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softteacher.config import load_settings
from softteacher.data.coco import load_coco
from softteacher.data.masks import draw_masks, require_masks
from softteacher.detections import Detections
from softteacher.detectors.mask_rcnn import mask_targets
from softteacher.errors import UserError
from softteacher.evaluation.analyze import analyze
from softteacher.evaluation.evaluate import evaluate
from softteacher.evaluation.metrics import KEYS, coco_metrics, coco_results
from softteacher.evaluation.report import write_report
from softteacher.evaluation.shard import Shard
from softteacher.training.train import train
from tests.helpers import SHARED
from tests.samples import MASK_TINY, dataset, polygon_tree, write_coco, write_json


def original(path, results):
    """What pycocotools says about the masks of a results file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        # results with boxes would have their areas measured by these
        found = truth.loadRes([{k: v for k, v in row.items() if k != "bbox"} for row in results])
        ev = COCOeval(truth, found, "segm")
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    return ev


def jittered(dataset, seed):
    """The masks of the truth as a detector would have them: 28 x 28 cells of shifted boxes, some classes wrong."""
    rng, found = np.random.default_rng(seed), {}
    for index, image in enumerate(dataset.images):
        boxes, labels = dataset.targets(index)
        size = (image.height, image.width)
        masks = torch.from_numpy(draw_masks(dataset.segmentations(index) if len(boxes) else [], size, np.eye(3), size))
        moved = boxes + rng.normal(0, 0.04, boxes.shape) * (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]]
        moved = torch.from_numpy(moved).float()
        cells = mask_targets(masks, moved, torch.arange(len(moved))).half().numpy()
        labels = np.where(rng.random(len(labels)) < 0.9, labels, rng.integers(0, len(dataset.categories), len(labels)))
        found[image.id] = Detections(moved.numpy(), rng.random(len(labels)).astype(np.float32), labels, cells)
    return found


def assert_equal_to_the_judge(dataset, path, seed):
    require_masks(dataset)
    results = coco_results(dataset, jittered(dataset, seed))
    ours, theirs = coco_metrics(dataset, results, masks=True), original(path, results)
    assert {key: ours["segm"][key] for key in KEYS} == pytest.approx(
        dict(zip(KEYS, theirs.stats, strict=True)), abs=1e-9
    )
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for n, name in enumerate(dataset.classes):
        values = precision[:, :, n]
        expected = float(values[values > -1].mean()) if (values > -1).any() else None
        assert ours["segm"]["per_class"][name] == pytest.approx(expected, abs=1e-9), name
    assert ours | {"segm": None} == coco_metrics(dataset, results) | {"segm": None}  # boxes as without masks
    return ours["segm"]


def test_real_data(tmp_path):
    """Polygons and crowds in run lengths, objects of all sizes; images with boxes only are left out."""
    path = SHARED / "datasets" / "coco80_mini" / "annotations" / "instances_val.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tree = json.loads(path.read_text())
    boxes_only = {row["image_id"] for row in tree["annotations"] if not row["segmentation"]}
    tree["images"] = [row for row in tree["images"] if row["id"] not in boxes_only]
    tree["annotations"] = [row for row in tree["annotations"] if row["image_id"] not in boxes_only]
    assert sum(row["iscrowd"] for row in tree["annotations"]) > 10
    path = write_json(tmp_path / "a.json", tree | {"softteacher": {"root": "/nowhere"}})
    ours = assert_equal_to_the_judge(load_coco(path), path, 0)
    assert 0.2 < ours["AP"] < 0.9
    assert all(ours[key] > 0 for key in ("APs", "APm", "APl"))


def mixed(tmp_path):
    """Polygons, run lengths of both kinds and a crowd in one json."""
    tree = polygon_tree(6) | {"softteacher": {"root": "/nowhere"}}
    for n, row in enumerate(tree["annotations"]):
        encoded = judge.merge(judge.frPyObjects(row["segmentation"], 24, 32))
        row |= {"area": float(judge.area(encoded)), "iscrowd": 0}
        if n % 3 == 1:
            row["segmentation"] = {"size": [24, 32], "counts": encoded["counts"].decode()}
        if n % 3 == 2:
            column = judge.decode(encoded).ravel(order="F")
            edges = np.flatnonzero(np.diff(column)) + 1
            counts = np.diff([0, *edges.tolist(), len(column)]).tolist()
            row |= {"segmentation": {"size": [24, 32], "counts": counts}, "iscrowd": int(n == 5)}
    return write_json(tmp_path / "a.json", tree)


@pytest.mark.parametrize("seed", range(3))
def test_all_forms_of_segmentation(tmp_path, seed):
    path = mixed(tmp_path)
    assert_equal_to_the_judge(load_coco(path), path, seed)


def test_no_detections(tmp_path):
    data = load_coco(mixed(tmp_path))
    metrics = coco_metrics(data, [], masks=True)
    assert metrics["segm"]["AP"] == metrics["AP"] == 0
    assert "segm" not in coco_metrics(data, [])


def test_results_have_run_lengths_of_the_whole_image(tmp_path):
    data = load_coco(mixed(tmp_path))
    boxes = np.array([[4, 2, 12, 20], [40, 2, 50, 9]], np.float32)
    cells = np.ones((2, 28, 28), np.float16)
    cells[:, :14] = 0
    row, empty = coco_results(data, {3: Detections(boxes, np.array([0.5, 0.4]), np.array([0, 1]), cells)})
    mask = judge.decode(row["segmentation"])
    assert mask.shape == (24, 32)
    assert mask.sum() == mask[11:20, 4:12].sum() == 72
    assert judge.area(empty["segmentation"]) == 0
    assert isinstance(row["segmentation"]["counts"], str)
    assert row["bbox"] == [4, 2, 8, 18]


@pytest.mark.parametrize("masks", [False, True])
def test_the_report_shows_masks(tmp_path, masks):
    data = dataset(write_coco(tmp_path / "set", polygon_tree(3), polygon_tree(2, first=101)))
    found = jittered(data, 0)
    for d in found.values():
        d.scores[:] = 0.9
        d.masks = d.masks if masks else None
    results = coco_results(data, found)
    numbers = coco_metrics(data, results, masks)
    page = write_report(data, results, numbers | {"weights": "teacher", "teacher": numbers}, {})
    assert ("COCO numbers of the masks" in page) == masks
    assert not masks or f"<td>{numbers['segm']['AP']:.3f}</td>" in page
    without = [{k: v for k, v in row.items() if k != "segmentation"} for row in results]
    plain = write_report(data, without, numbers | {"weights": "teacher", "teacher": numbers}, {})
    assert (plain != page) == masks  # the pictures differ by the masks


def test_an_image_without_boxes_and_without_a_size(tmp_path):
    """Labelling tools don't know the size of an image that nobody has drawn in; at once, in shards, and analysed."""
    tree = polygon_tree(3, first=101)
    data = write_coco(tmp_path / "set", polygon_tree(4), tree)
    labeled, validation = (str(data / "annotations" / f"instances_{part}.json") for part in ("train", "val"))
    tree["annotations"] = [row for row in tree["annotations"] if row["image_id"] != 102]
    write_json(data / "annotations" / "instances_val.json", tree)
    settings = load_settings("demo", [*MASK_TINY, "training.iterations=1", "detector.score_threshold=0.02"])
    train(labeled, None, validation, str(tmp_path / "model"), settings)
    model = str(tmp_path / "model")
    known = evaluate(model, validation, str(tmp_path / "known"))
    for key in ("width", "height"):
        del tree["images"][1][key]
    write_json(data / "annotations" / "instances_val.json", tree)
    assert evaluate(model, validation, str(tmp_path / "out")) == known
    parts = [str(tmp_path / str(n)) for n in (1, 2)]
    for n, part in enumerate(parts, start=1):
        evaluate(model, validation, part, shard=Shard(n, 2))
    assert evaluate(model, validation, str(tmp_path / "joined"), parts=parts) == known
    analyze(model, validation, str(tmp_path / "analysis"))
    for folder in ("out", "joined", "analysis"):
        found = (tmp_path / folder / "detections.json").read_text()
        assert found == (tmp_path / "known" / "detections.json").read_text()
    assert 102 in {row["image_id"] for row in json.loads(found)}
    (data / "images" / "102.png").unlink()  # since its shard looked at it
    with pytest.raises(UserError, match=r"102\.png: can't be read, and .*instances_val\.json doesn't tell its size"):
        evaluate(model, validation, str(tmp_path / "late"), parts=parts)
    evaluate(model, validation, str(tmp_path / "without"))  # one that is broken is left out
