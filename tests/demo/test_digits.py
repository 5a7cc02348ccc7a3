"""The embedded data set: a COCO data set like any other, the same on every machine."""

import json

import numpy as np
from PIL import Image

from softteacher.data.check import check_images
from softteacher.data.coco import load_coco
from softteacher.demo.digits import NAMES, SIDE, make_digits


def test_it_is_a_coco_data_set(digits):
    ids = []
    for part, count in (("train", 12), ("val", 6)):
        data = check_images(load_coco(digits / "annotations" / f"instances_{part}.json"), 0)
        assert len(data) == count
        assert data.classes == list(NAMES)
        ids += [i.id for i in data.images]
        for index in range(count):
            boxes, _ = data.targets(index)
            assert 1 <= len(boxes) <= 5
            assert boxes.min() >= 0
            assert boxes.max() <= SIDE
            assert ((boxes[:, 2:] - boxes[:, :2]) > 4).all()
    assert sorted(ids) == list(range(1, 19))


def test_it_is_the_same_every_time(digits, tmp_path):
    make_digits(tmp_path / "again", train=12, val=6)
    make_digits(tmp_path / "other", train=12, val=6, seed=1)
    for part in ("train", "val"):
        trees = [
            json.loads((d / "annotations" / f"instances_{part}.json").read_text())
            for d in (digits, tmp_path / "again", tmp_path / "other")
        ]
        assert trees[0] == trees[1] != trees[2]
    for file in sorted((digits / "images").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / "images" / file.name).read_bytes()
        assert file.read_bytes() != (tmp_path / "other" / "images" / file.name).read_bytes()


def test_a_scene_depends_on_its_own_id_only(digits, tmp_path):
    make_digits(tmp_path, train=3, val=1)
    for name in ("000001.jpg", "000002.jpg", "000003.jpg"):
        assert (tmp_path / "images" / name).read_bytes() == (digits / "images" / name).read_bytes()


def test_boxes_are_on_digits(digits):
    """Digits are bright on darker ground: inside the boxes it is brighter than around them."""
    data = load_coco(digits / "annotations" / "instances_train.json")
    brighter = []
    for index in range(len(data)):
        pixels = np.asarray(Image.open(data.uri(index)).convert("L"), float)
        for x1, y1, x2, y2 in data.targets(index)[0].astype(int):
            brighter.append(pixels[y1:y2, x1:x2].mean() > pixels.mean())
    assert np.mean(brighter) > 0.9
