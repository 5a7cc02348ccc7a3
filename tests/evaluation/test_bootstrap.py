"""The paired bootstrap: its counting is the library's on images that come twice, its interval covers the truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask

from softteacher.data.coco import CocoDataset, load_coco
from softteacher.evaluation.bootstrap import ImageScores, compare
from softteacher.evaluation.metrics import coco_metrics
from tests.samples import coco_tree, polygon_tree, write_json


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """60 images with a cat and a dog in each."""
    path = tmp_path_factory.mktemp("bootstrap") / "val.json"
    return load_coco(write_json(path, polygon_tree(60)), str(path.parent))


def detector(dataset: CocoDataset, seed: int, found: dict[int, float]) -> list[dict]:
    """Results that hold each box of a class (by label) with some probability, and as many wrong ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, image in enumerate(dataset.images):
        for (x1, y1, x2, y2), label in zip(*dataset.targets(index), strict=True):
            x, y = (x1, y1) if rng.random() < found[int(label)] else (x1 + 12, y1)
            category = dataset.categories[label][0]
            box = [float(v) for v in (x, y, x2 - x1, y2 - y1)]
            rows.append({
                "image_id": image.id, "category_id": category, "bbox": box, "score": round(float(rng.random()), 3)
            })  # fmt: skip
    return rows


def test_all_images_give_cocos_numbers(dataset: CocoDataset) -> None:
    results = detector(dataset, 1, {0: 0.7, 1: 0.5})
    scores = ImageScores(dataset, results).per_class(np.arange(60))
    assert dict(zip(dataset.classes, scores.tolist(), strict=True)) == pytest.approx(
        coco_metrics(dataset, results)["per_class"], abs=1e-12
    )


def test_an_image_that_is_drawn_twice_counts_twice(dataset: CocoDataset) -> None:
    """Against the library on a data set where the images of the sample are written out one by one."""
    results = detector(dataset, 1, {0: 0.7, 1: 0.5})
    drawn = np.random.default_rng(3).integers(0, 60, 60)
    tree = {"images": [], "annotations": [], "categories": coco_tree()["categories"]}
    copied = []
    for n, index in enumerate(drawn.tolist(), start=1):
        image = dataset.images[index]
        tree["images"].append({"id": n, "file_name": f"{n}.png", "width": image.width, "height": image.height})
        for (x1, y1, x2, y2), label in zip(*dataset.targets(index), strict=True):
            row = {"id": len(tree["annotations"]) + 1, "image_id": n, "category_id": dataset.categories[label][0]}
            tree["annotations"].append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
        copied += [row | {"image_id": n} for row in results if row["image_id"] == image.id]
    path = Path(dataset.root) / "drawn.json"
    expected = coco_metrics(load_coco(write_json(path, tree), dataset.root), copied)["per_class"]
    scores = ImageScores(dataset, results).per_class(drawn)
    assert dict(zip(dataset.classes, scores.tolist(), strict=True)) == pytest.approx(expected, abs=1e-12)


def test_a_known_gain_is_in_the_interval_which_excludes_zero(dataset: CocoDataset) -> None:
    """The gain is that of the same two detectors on 40 times as many images."""
    many = load_coco(write_json(Path(dataset.root) / "many.json", coco_tree(2400)), dataset.root)
    better, worse = {0: 0.9, 1: 0.9}, {0: 0.6, 1: 0.6}
    truth = coco_metrics(many, detector(many, 5, better))["AP"] - coco_metrics(many, detector(many, 6, worse))["AP"]
    pair = detector(dataset, 1, better), detector(dataset, 2, worse)
    whole, classes = compare(dataset, *pair, labels=[0, 1], resamples=300)
    assert whole.ap == pytest.approx(coco_metrics(dataset, pair[0])["AP"])
    assert whole.other == pytest.approx(coco_metrics(dataset, pair[1])["AP"])
    assert 0 < whole.low < truth < whole.high
    assert set(classes) == {"cat", "dog"}
    assert compare(dataset, *pair, labels=[0, 1], resamples=300) == (whole, classes)


def test_like_detectors_give_an_interval_with_zero(dataset: CocoDataset) -> None:
    pair = (detector(dataset, seed, {0: 0.7, 1: 0.7}) for seed in (1, 2))
    whole, _ = compare(dataset, *pair, labels=[0, 1], resamples=300)
    assert whole.low < 0 < whole.high
    same = detector(dataset, 1, {0: 0.7, 1: 0.7})
    whole, classes = compare(dataset, same, same, labels=[0, 1], resamples=50)
    assert (whole.low, whole.high, classes["cat"].low, classes["cat"].high) == (0, 0, 0, 0)


def test_a_worse_class_shows_beside_a_better_one(dataset: CocoDataset) -> None:
    pair = detector(dataset, 1, {0: 0.95, 1: 0.3}), detector(dataset, 2, {0: 0.5, 1: 0.7})
    _, classes = compare(dataset, *pair, labels=[0, 1], resamples=300)
    assert classes["cat"].low > 0
    assert classes["dog"].high < 0
    whole, classes = compare(dataset, *pair, labels=[1], resamples=50)
    assert (whole.ap, whole.other) == (classes["dog"].ap, classes["dog"].other)
    assert set(classes) == {"dog"}


def test_a_class_without_boxes_has_no_difference(dataset: CocoDataset) -> None:
    wider = replace(dataset, categories=[*dataset.categories, (9, "bird")])
    pair = detector(dataset, 1, {0: 0.7, 1: 0.7}), detector(dataset, 2, {0: 0.7, 1: 0.7})
    whole, classes = compare(wider, *pair, labels=[0, 1, 2], resamples=20)
    assert (classes["bird"].ap, classes["bird"].low) == (None, None)
    assert whole.ap == pytest.approx(coco_metrics(dataset, pair[0])["AP"])


def test_masks(dataset: CocoDataset) -> None:
    """Masks that miss where the boxes are right."""
    results = []
    for row in detector(dataset, 1, {0: 1.0, 1: 1.0}):
        x, y, w, h = row["bbox"]
        (lengths,) = coco_mask.frPyObjects([[x, y, x + w / 4, y, x + w / 4, y + h, x, y + h]], 24, 32)
        results.append(row | {"segmentation": {"size": [24, 32], "counts": lengths["counts"].decode()}})
    assert ImageScores(dataset, results).per_class(np.arange(60)) == pytest.approx([1, 1])
    assert ImageScores(dataset, results, "segm").per_class(np.arange(60)) == pytest.approx([0, 0])
