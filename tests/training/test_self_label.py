"""STAC: a teacher is trained (or given), labels once, and the student learns from its boxes."""

import json

import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.model_folder import ModelFolder
from softteacher.training.self_label import self_label
from softteacher.training.train import train
from tests.samples import TINY, coco_tree, write_coco

CPU = torch.device("cpu")


def settings(*overrides):
    return load_settings("demo", [*TINY, "method.name=stac", "method.burn_in=0", "training.iterations=2", *overrides])


def test_pseudo_boxes_are_the_teachers(trained, manifests):
    unlabeled = load_coco(manifests / "unlabeled.json")
    labeled = self_label(str(trained), unlabeled, unlabeled.categories, settings("method.cls_threshold=0.06"), CPU)
    sizes = torch.tensor([[i.width, i.height] for i in labeled.images])[
        torch.from_numpy(labeled.annotations.image_index)
    ]
    box = torch.from_numpy(labeled.annotations.bbox)
    assert len(box) > 0
    assert (box[:, 2:] > 0).all()
    assert (box[:, :2] + box[:, 2:] <= sizes + 0.01).all()  # in pixels of the original image
    assert [i.id for i in labeled.images] == [i.id for i in unlabeled.images]
    assert labeled.annotations.bbox.tolist() != unlabeled.annotations.bbox.tolist()


def test_what_is_refused(trained, manifests, tmp_path):
    unlabeled = load_coco(manifests / "unlabeled.json")
    with pytest.raises(UserError, match=r"finds nothing in the 6 unlabelled images .*cls_threshold=1; lower it"):
        self_label(str(trained), unlabeled, unlabeled.categories, settings("method.cls_threshold=1"), CPU)
    other = load_coco(write_coco(tmp_path, coco_tree()) / "annotations" / "instances_train.json")
    with pytest.raises(UserError, match="has other classes than the labelled set"):
        self_label(str(trained), other, other.categories, settings(), CPU)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_whole_method(manifests, tmp_path, elsewhere):
    """Without a model one is trained first, which stays beside the result, or where a retry in another pod finds it.

    Run again, nothing is done twice.
    """
    parts = [str(manifests / f"{name}.json") for name in ("labeled", "unlabeled", "validation")]
    chosen = settings("method.cls_threshold=0.05", "detector.score_threshold=0.01")
    checkpoints = str(tmp_path / "kept") if elsewhere else None
    labeler = tmp_path / "kept" / "labeler-model" if elsewhere else tmp_path / "out" / "labeler"
    metrics = train(*parts, str(tmp_path / "out"), chosen, checkpoints)
    assert ModelFolder(labeler).settings.method.name == "supervised"
    made = ModelFolder(tmp_path / "out")
    assert made.settings.method.label_model == str(labeler)
    rows = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["pseudo_boxes_cls"] > 0
    assert rows[-1]["unsup_cls"] > 0
    assert train(*parts, str(tmp_path / "out"), chosen, checkpoints) == metrics
