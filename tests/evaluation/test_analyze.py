"""`analyze`: who matches whom, the numbers of the figures by hand, and a real run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from softteacher.config import Settings, load_settings
from softteacher.detectors.build import build
from softteacher.errors import UserError
from softteacher.evaluation.analyze import analyze, match, rank_correlation, summarize
from softteacher.evaluation.evaluate import evaluate, load_detector
from softteacher.evaluation.metrics import LOW_SCORES
from softteacher.evaluation.observe import Observed, Observer
from softteacher.methods.soft_teacher import SoftTeacher
from softteacher.model_folder import ModelFolder
from tests.samples import MASK_TINY, coco_tree, dataset, noise_views, write_coco

CAT, DOG = 0, 1
A, B, IN_CROWD = [0, 0, 10, 10], [20, 0, 30, 10], [5, 14, 15, 22]
# label, score, box; is it right, what is its IoU (none: it lies in the crowd region of its class and is left out)
CASES = [
    (CAT, 0.9, A, True, 1),
    (CAT, 0.8, A, False, 1),  # taken
    (DOG, 0.7, B, False, 0),
    (CAT, 0.6, [22, 0, 32, 10], True, 80 / 120),
    (CAT, 0.5, IN_CROWD, False, None),
    (DOG, 0.4, IN_CROWD, False, 0),
    (CAT, 0.3, [0, 8, 10, 16], False, 20 / 160),  # just half in the crowd region
]


def observed(label, score, box, variance=None):
    n = len(score)
    variance = np.linspace(0.01, 0.09, n) if variance is None else variance
    boxes = np.array(box, np.float32).reshape(-1, 4)
    scores, labels = np.array(score, np.float32), np.array(label, np.int64)
    return Observed(boxes, scores, labels, variance=variance, feature=np.ones(3))


@pytest.fixture
def matched(tmp_path):
    tree = coco_tree(2, classes=("cat", "dog"))
    tree["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [20, 0, 10, 10]},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [0, 12, 32, 12], "iscrowd": 1},
        {"id": 4, "image_id": 2, "category_id": 2, "bbox": [0, 0, 10, 10]},
    ]
    data = dataset(write_coco(tmp_path, tree))
    label, score, box, _, _ = zip(*CASES, strict=True)
    order = [3, 0, 6, 2, 5, 1, 4]  # matching goes by score, not by place
    first = observed(*([column[n] for n in order] for column in (label, score, box)), np.array(order) / 100)
    return match(data, {1: first, 2: observed([], [], [])}), data


def test_match(matched):
    boxes, _ = matched
    order = np.argsort(-boxes["score"])
    kept = [(n, case) for n, case in enumerate(CASES) if case[4] is not None]
    assert boxes["score"][order] == pytest.approx([case[1] for _, case in kept])
    assert boxes["label"][order].tolist() == [case[0] for _, case in kept]
    assert boxes["correct"][order].tolist() == [case[3] for _, case in kept]
    assert boxes["iou"][order] == pytest.approx([case[4] for _, case in kept])
    assert boxes["variance"][order] == pytest.approx([n / 100 for n, _ in kept])


def test_numbers_by_hand(matched):
    boxes, data = matched
    method = Settings().method.model_copy(update={"cls_threshold": 0.75, "rpn_threshold": 0.95})
    facts = summarize(boxes, data.class_counts(), method)
    assert (facts["objects"], facts["detections"]) == (3, 6)
    row = dict(zip(("threshold", "precision", "recall", "f1"), (0.5, 2 / 4, 2 / 3, 4 / 7), strict=True))
    assert facts["at"]["pool_threshold"] == pytest.approx(row)
    assert facts["at"]["cls_threshold"] == pytest.approx(
        {"threshold": 0.75, "precision": 0.5, "recall": 1 / 3, "f1": 0.4}
    )
    assert facts["at"]["rpn_threshold"] == {"threshold": 0.95, "precision": None, "recall": 0, "f1": None}
    assert facts["per_class"]["cat"]["objects"] == 2
    cat, dog = (facts["per_class"][name]["pool_threshold"] for name in ("cat", "dog"))
    assert (cat["precision"], cat["recall"]) == pytest.approx((2 / 3, 1))
    assert (dog["precision"], dog["recall"]) == (0, 0)
    assert facts["best_f1"] == pytest.approx(row | {"threshold": 0.4})
    curve = facts["curve"]
    assert curve["threshold"] == pytest.approx(np.arange(0.29, 1.001, 0.01))
    assert [curve["recall"][n] for n in (0, 30, 31, 60, 61)] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])
    assert curve["precision"][-1] is None
    here = facts["localisation"]
    assert (here["above"], here["boxes"]) == (0, 6)  # the pool has too few to see anything
    assert here["mean_iou"] == pytest.approx((2 + 80 / 120 + 20 / 160) / 6)
    assert here["share_under_threshold"] == pytest.approx(2 / 6)  # variances 0, .01 of 0, .01, .02, .03, .05, .06
    assert here["mean_iou_under_threshold"] == 1
    assert here["variance"]["bins"][0] == {"middle": 0, "boxes": 1, "mean": 1, "spread": 0}


def many(score, correct, iou=None):
    n = len(score)
    column = {"score": np.array(score, np.float32), "correct": np.array(correct), "label": np.zeros(n, np.int64)}
    return column | {"variance": np.linspace(0, 0.1, n), "iou": np.ones(n) if iou is None else np.array(iou)}


@pytest.mark.parametrize(
    ("score", "correct", "objects", "advice"),
    [
        ([0.6] * 8, [True] * 8, 8, "At cls_threshold 0.9 the recall is 0.00: most objects are taught as background; "
         "the best F1 (1.00) is at 0.59. Try a lower method.cls_threshold."),
        ([0.95] * 6 + [0.6] * 4, [True] * 10, 10, "At cls_threshold 0.9 the recall is 0.60: 40% of the objects are "
         "taught as background; the best F1 (1.00) is at 0.59. Try a lower method.cls_threshold."),
        ([0.95] * 9 + [0.6], [True] * 9 + [False], 9, "cls_threshold 0.9 fits: precision 1.00, recall 1.00; "
         "the best F1 (1.00) is at 0.60."),
        ([0.97] * 5 + [0.93] * 5, [True] * 5 + [False] * 5, 5, "At cls_threshold 0.9 the recall is 1.00, but 50% of "
         "the boxes above it are wrong; the best F1 (1.00) is at 0.93. Try a higher method.cls_threshold."),
        ([0.5], [False], 5, "Not one box is right: train longer, or look whether the labels fit the images."),
        ([], [], 5, "Not one box is right: train longer, or look whether the labels fit the images."),
    ],
)  # fmt: skip
def test_advice(score, correct, objects, advice):
    boxes = many(score, np.array(correct, bool))
    assert summarize(boxes, {"cat": objects}, Settings().method)["advice"] == advice


@pytest.mark.parametrize("preset", ["no-cls-threshold", "small"])
def test_the_pool_stands_before_the_other_thresholds(preset):
    """What is under it teaches nothing, whatever a class asks for."""
    boxes = many([0.95] * 5 + [0.2] * 20, np.arange(25) < 5)
    method = load_settings(preset, ["method.pool_threshold=0.5", "method.adaptive_share=2"]).method
    facts = summarize(boxes, {"cat": 5}, method)
    assert all((row["precision"], row["recall"]) == (1, 1) for row in facts["at"].values())
    assert " precision 1.00, recall 1.00; " in facts["advice"]
    assert facts["at"].get("cls_threshold", {"threshold": 0.5})["threshold"] == 0.5
    low = summarize(many([0.4] * 5, np.ones(5, bool)), {"cat": 5}, method)
    assert "most objects are taught as background" in low["advice"]
    assert low["advice"].endswith("and a lower method.pool_threshold.")


@pytest.mark.parametrize(
    ("share", "wrong", "advice"),
    [
        (1.0, 0, "The adaptive thresholds fit: precision 1.00, recall 1.00; the best F1 (1.00) is at 0.50."),
        (0.5, 0, "At the adaptive thresholds the recall is 0.50: 50% of the objects are taught as background; the best "
         "F1 (1.00) is at 0.50. Try a higher method.adaptive_share."),
        (2.0, 20, "At the adaptive thresholds the recall is 1.00, but 50% of the boxes above it are wrong; the best F1 "
         "(1.00) is at 0.45. Try a lower method.adaptive_share."),
    ],
)  # fmt: skip
def test_adaptive_thresholds(share, wrong, advice):
    """Classes of their own scores: 0.51 to 0.6 of one, 0.81 to 0.9 of the other, all right, and some wrong ones."""
    scores = np.concatenate([np.linspace(0.51, 0.6, 10), np.linspace(0.81, 0.9, 10), np.full(wrong, 0.45)])
    boxes = many(scores, np.arange(20 + wrong) < 20)
    boxes["label"] = np.concatenate([np.repeat([0, 1], 10), np.arange(wrong) % 2])
    method = load_settings("small", [f"method.adaptive_share={share}"]).method
    facts = summarize(boxes, {"cat": 10, "dog": 10}, method)
    assert facts["advice"] == advice
    assert set(facts["at"]) == {"pool_threshold", "adaptive"}
    assert facts["at"]["adaptive"]["threshold"] is None
    if share == 0.5:  # five of each are above
        assert facts["per_class"]["cat"]["adaptive"]["threshold"] == pytest.approx(0.55)
        assert facts["per_class"]["dog"]["adaptive"]["threshold"] == pytest.approx(0.85)
    elif not wrong:  # nothing under the pool's threshold teaches
        assert facts["per_class"]["cat"]["adaptive"]["threshold"] == method.pool_threshold


def test_localisation_looks_at_the_pool():
    rng = np.random.default_rng(0)
    facts = summarize(many(np.linspace(0.3, 0.99, 100), [True] * 100, rng.random(100)), {"cat": 100}, Settings().method)
    here = facts["localisation"]
    assert (here["above"], here["boxes"]) == (0.5, 71)
    assert [b["boxes"] for b in here["score"]["bins"]] == [9] * 7 + [8]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [1, 4, 9], 1),
        ([1, 2, 3], [5, 4, -7], -1),
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2, 3], [0, 0, 0], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_rank_correlation(x, y, expected):
    assert rank_correlation(np.array(x), np.array(y)) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["soft_teacher", "supervised"])
def test_observer(trained, method):
    source = ModelFolder(trained)
    detector, _ = load_detector(source, "teacher")
    settings = source.settings
    views = noise_views(3)
    named = settings.model_copy(update={"method": settings.method.model_copy(update={"name": method})})
    with torch.inference_mode():
        found = Observer(detector, named, source.classes)(views.images, views.sizes)
        plain = [d.numpy() for d in detector(views.images, views.sizes)]
        features = detector.features(views.images[1:2])
        noise = [torch.Generator().manual_seed(settings.training.seed)]
        alone = detector.detections(features, views.sizes[1:2])
        teacher = SoftTeacher(detector, detector, settings, dict.fromkeys(source.classes, 0.0))
        variance = teacher.box_variance(features, alone, views.sizes[1:2], noise)
    for a, b in zip(found, plain, strict=True):
        assert len(a) == len(b) == len(a.variance) > 0
        assert all((getattr(a, key) == getattr(b, key)).all() for key in ("boxes", "scores", "labels"))
        assert a.feature.shape == (settings.detector.fpn_channels,)
    # the same, whatever the batch
    assert found[1].variance == pytest.approx(variance[0].numpy(), rel=1e-3, abs=1e-6)
    assert found[1].feature == pytest.approx(features[0].mean((2, 3))[0].numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["soft_teacher", "stac"])
def test_observer_keeps_masks(method):
    """Also of a model whose method has a mixup that Soft Teacher would refuse with masks."""
    torch.manual_seed(0)
    settings = load_settings("demo", [*MASK_TINY, f"method.name={method}", "method.mixup=0.5"])
    detector, views = build(settings.detector, 3).eval(), noise_views(2)
    with torch.inference_mode():
        found = Observer(detector, settings, ["a", "b", "c"])(views.images, views.sizes)
        plain = [d.numpy() for d in detector(views.images, views.sizes)]
    for a, b in zip(found, plain, strict=True):
        assert len(a) == len(a.variance) > 0
        assert (a.masks == b.masks).all()


@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_a_real_run(trained, manifests, tmp_path, weights):
    data, out = str(manifests / "validation.json"), tmp_path / "out"
    facts = analyze(str(trained), data, str(out), weights=weights)
    figures = {"precision_recall.png", "iou_over_score.png", "iou_over_variance.png"}
    assert {p.name for p in out.iterdir()} == figures | {
        "metrics.json",
        "detections.json",
        "report.html",
        "analysis.json",
    }
    assert json.loads((out / "analysis.json").read_text()) == facts
    assert facts["detections"] > 30
    assert facts["localisation"]["variance"]["correlation"] is not None
    for name in figures:
        assert np.asarray(Image.open(out / name)).std() > 0
    metrics = json.loads((out / "metrics.json").read_text())
    expected = evaluate(str(trained), data, str(tmp_path / "evaluated"))
    for name in ("teacher", "student"):
        assert metrics[name] == {key: value for key, value in expected[name].items() if key != LOW_SCORES}
    assert metrics["weights"] == weights
    page = (out / "report.html").read_text()
    assert facts["advice"] in page
    assert page.count("<img ") == (tmp_path / "evaluated" / "report.html").read_text().count("<img ") + len(figures)


def test_images_elsewhere(trained, digits, manifests, tmp_path):
    data = str(manifests / "validation.json")
    with pytest.raises(UserError, match="6 of 6 images are missing or broken"):
        analyze(str(trained), data, str(tmp_path / "out"), images=str(tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "moved").symlink_to(digits / "images")
    assert analyze(str(trained), data, str(tmp_path / "out"), images=str(tmp_path / "moved"))["images"] == 6
