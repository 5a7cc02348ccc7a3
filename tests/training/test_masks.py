"""The doors `train`, `evaluate`, `analyze` and `rank` with a detector that has masks."""

import json

import pytest
from faster_coco_eval.core import mask as coco_mask

from softteacher.config import load_settings
from softteacher.data.coco import load_coco
from softteacher.data.masks import require_masks
from softteacher.errors import UserError
from softteacher.evaluation.analyze import analyze
from softteacher.evaluation.evaluate import evaluate
from softteacher.evaluation.rank import rank
from softteacher.training.train import train
from tests.samples import MASK_TINY, coco_tree, polygon_tree, write_coco, write_json

LOW = [f"method.{key}_threshold=0.02" for key in ("pool", "rpn", "cls")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("polygons"), polygon_tree(4), polygon_tree(3, first=101))


def paths(data):
    train_json, val_json = (str(data / "annotations" / f"instances_{part}.json") for part in ("train", "val"))
    return train_json, val_json


def test_train_and_evaluate(data, tmp_path, capsys):
    labeled, validation = paths(data)
    chosen = [*MASK_TINY, *LOW, "training.iterations=3", "method.burn_in=0.3", "detector.score_threshold=0.02"]
    metrics = train(labeled, labeled, validation, str(tmp_path / "model"), load_settings("demo", chosen))
    assert 0 <= metrics["teacher"]["segm"]["AP"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "model" / "training.jsonl").read_text().splitlines()]
    assert lines[0]["mask"] > 0
    assert lines[-1]["unsup_mask"] > 0
    capsys.readouterr()
    found = evaluate(str(tmp_path / "model"), validation, str(tmp_path / "out"))
    assert {name: found[name] for name in ("teacher", "student")} == metrics
    said = capsys.readouterr().err
    assert all(f"evaluate: {name} masks AP {metrics[name]['segm']['AP']:.4f}" in said for name in metrics)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["segm"] == found["segm"]
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert results
    assert all(row["segmentation"]["size"] == [24, 32] for row in results)
    assert "COCO numbers of the masks" in (tmp_path / "out" / "report.html").read_text()
    facts = analyze(str(tmp_path / "model"), validation, str(tmp_path / "analysis"))
    assert facts["detections"] == len(results)
    for name in ("metrics.json", "detections.json"):
        assert (tmp_path / "analysis" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_masks_to_correct(data, tmp_path, monkeypatch):
    """`rank` draws the teacher's masks, so that `train` takes the labels when they come back."""
    labeled, validation = paths(data)
    train(
        labeled, None, validation, str(tmp_path / "model"), load_settings("demo", [*MASK_TINY, "training.iterations=1"])
    )
    monkeypatch.setattr("softteacher.evaluation.rank.PRE_LABEL_SCORE", 0.05)  # one that has learned little
    rank(str(tmp_path / "model"), labeled, str(tmp_path / "out"), labeled=labeled)
    to_label = load_coco(tmp_path / "out" / "to_label.json")
    assert len(to_label.annotations) > 0
    require_masks(to_label)
    tree = json.loads((tmp_path / "out" / "to_label.json").read_text())
    assert all(a["area"] == coco_mask.area(a["segmentation"]) for a in tree["annotations"])


@pytest.mark.parametrize("bad", ["train", "val"])
def test_boxes_only(data, tmp_path, bad):
    """Nothing is trained on, or scored by, boxes where masks are wanted."""
    boxes = write_json(tmp_path / "annotations" / f"{bad}.json", coco_tree(3) | {"softteacher": {"root": "/nowhere"}})
    labeled, validation = paths(data)
    sets = (boxes, validation) if bad == "train" else (labeled, boxes)
    with pytest.raises(UserError, match=rf"{bad}.json: annotation 2: has no 'segmentation'"):
        train(sets[0], None, sets[1], str(tmp_path / "model"), load_settings("demo", [*MASK_TINY]))
    assert not (tmp_path / "model").exists()
