"""Masks in views: polygons and run lengths lie where the object is seen, whatever the view; bad ones are named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as judge

from softteacher.config import load_settings
from softteacher.data.coco import load_coco
from softteacher.data.images import PAD
from softteacher.data.loader import batches
from softteacher.data.masks import draw_masks, require_masks
from softteacher.data.views import View, geometry_matrix, labeled_view, strong_view, warp, weak_view
from softteacher.errors import UserError
from tests.samples import TINY, polygon_tree, write_coco, write_json

SIZE = (220, 160)  # width, height
CORNERS = [60.0, 40, 150, 40, 150, 75, 100, 75, 100, 120, 60, 120]  # an L
STILL = ["data.strong_color=false", "data.labeled_color=false", "data.strong_erase=false", "data.short_side=160"]


def marked():
    image = Image.new("RGB", SIZE, PAD)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((60, 40, 149, 74), fill=(255, 0, 0))
    canvas.rectangle((60, 40, 99, 119), fill=(255, 0, 0))
    return image


def segmentations():
    """The L as one polygon, as two that overlap, as run lengths and as compressed run lengths."""
    pixels = (np.asarray(marked())[..., 1] == 0).astype(np.uint8)
    column = pixels.ravel(order="F")
    counts = np.diff(np.flatnonzero(np.diff(column, prepend=1 - column[:1], append=1 - column[-1:]))).tolist()
    compressed = judge.encode(np.asfortranarray(pixels))
    assert column[0] == 0  # COCO's runs begin with the background
    two = [[60, 40, 150, 40, 150, 75, 60, 75], [60, 60, 100, 60, 100, 120, 60, 120]]
    return [
        [CORNERS],
        two,
        {"size": [SIZE[1], SIZE[0]], "counts": counts},
        {"size": [SIZE[1], SIZE[0]], "counts": compressed["counts"].decode()},
    ]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def check(view):
    red = np.asarray(view.image, float)
    seen = (red[..., 0] - red[..., 1]) / 255 > 0.5
    masks = draw_masks(segmentations(), SIZE[::-1], view.matrix, view.image.size[::-1])
    assert masks.shape == (4, *view.image.size[::-1])
    assert masks.dtype == bool
    assert min(iou(mask, seen) for mask in masks) > 0.95


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("scale", [0.6, 1, 1.5])
@pytest.mark.parametrize("make", [weak_view, labeled_view, strong_view])
def test_masks_cover_the_object_in_every_view(make, scale, flip):
    data = load_settings(None, [*STILL, f"data.scale_jitter=[{scale}, {scale}]", f"data.horizontal_flip={flip}"]).data
    for seed in range(6):
        check(make(marked(), np.random.default_rng(seed), data))


def test_masks_cover_the_object_after_each_geometry_operation():
    data = load_settings(None, STILL).data
    for seed in range(16):
        check(warp(View(marked(), np.eye(3)), geometry_matrix(SIZE, np.random.default_rng(seed), data)))


def test_polygons_are_drawn_as_pycocotools_draws_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygon = (rng.random(2 * rng.integers(3, 9)) * 300 - 40).tolist()
        expected = judge.decode(judge.frPyObjects([polygon], 160, 220))[..., 0] > 0
        assert (draw_masks([[polygon]], (160, 220), np.eye(3), (160, 220))[0] == expected).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "has no 'segmentation'"),
        ([], "has no 'segmentation'"),
        ([[1, 2, 3, 4]], "of 3 corners or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "of 3 corners or more"),
        ([[1, 2, 3, 4, 5, 6], 5], "of 3 corners or more"),
        ([[1, 2, 3, 4, 5, "6"]], "the corners must be pixels"),
        ([[1, 2, 3, 4, 5, 1e9]], "the corners must be pixels"),
        ([[1, 2, float("nan"), 4, 5, 6]], "the corners must be pixels"),
        ("mask.png", "must be a list of polygons"),
        ({"counts": [768]}, "must be a list of polygons"),
        ({"counts": [768], "size": [32, 24]}, r"the 'size' of its image, \[24, 32\]"),
        ({"counts": [5, 5], "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"counts": [5, 5000], "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"counts": [-5, 773], "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"counts": ["a"], "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"counts": [2**70], "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"counts": "garbage", "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"counts": 7, "size": [24, 32]}, "run lengths of its segmentation are broken"),
        ({"size": [24, 32]}, "run lengths of its segmentation are broken"),
    ],
)
def test_an_annotation_without_a_mask_is_named(tmp_path, segmentation, message):
    tree = polygon_tree(3) | {"softteacher": {"root": "/nowhere"}}
    tree["annotations"][2]["segmentation"] = segmentation
    if segmentation is None:
        del tree["annotations"][2]["segmentation"]
    dataset = load_coco(write_json(tmp_path / "a.json", tree))
    with pytest.raises(UserError, match=message) as e:
        require_masks(dataset)
    assert str(e.value).startswith(f"{dataset.source}: annotation {tree['annotations'][2]['id']}: ")
    assert "use a fasterrcnn detector" in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_data_set_of_boxes_has_no_masks(tmp_path):
    tree = polygon_tree(2) | {"softteacher": {"root": "/nowhere"}}
    for row in tree["annotations"]:
        del row["segmentation"]
    with pytest.raises(UserError, match="annotation 2: has no 'segmentation'"):
        require_masks(load_coco(write_json(tmp_path / "a.json", tree)))


def test_run_lengths_with_unicode_are_broken(tmp_path):
    tree = json.loads(json.dumps(polygon_tree(1))) | {"softteacher": {"root": "/nowhere"}}
    tree["annotations"][0]["segmentation"] = {"counts": "ü方", "size": [24, 32]}
    with pytest.raises(UserError, match="broken"):
        require_masks(load_coco(write_json(tmp_path / "a.json", tree)))


def test_batches_have_masks_only_where_the_detector_wants_them(tmp_path):
    """They belong to the boxes, crowd regions left out: a square's mask fills its box."""
    tree = polygon_tree(4)
    tree["annotations"][0]["iscrowd"] = 1
    data = load_coco(write_coco(tmp_path / "set", tree) / "annotations" / "instances_train.json")
    plain = load_settings("demo", [*TINY, "training.iterations=3"])
    wanted = load_settings("demo", [*TINY, "training.iterations=3", "detector.name=maskrcnn_tiny_fpn"])
    for without, batch in zip(batches(data, data, plain, 0), batches(data, data, wanted, 0), strict=True):
        assert without.labeled.masks is None
        assert batch.weak.masks is batch.strong.masks is None
        assert torch.equal(without.labeled.images, batch.labeled.images)
        views = batch.labeled
        for masks, boxes, size in zip(views.masks, views.boxes, views.sizes, strict=True):
            assert masks.shape == (len(boxes), *size.tolist())
            for mask, box in zip(masks, boxes, strict=True):
                ys, xs = torch.nonzero(mask, as_tuple=True)
                found = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
                torch.testing.assert_close(found, box, atol=1, rtol=0)
                assert mask.sum() == pytest.approx(((box[2] - box[0]) * (box[3] - box[1])).item(), rel=0.1)
