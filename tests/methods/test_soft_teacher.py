"""One step of Soft Teacher: what is a pseudo box, where it lands, who learns. Numbers: see test_numerics."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from softteacher.config import load_settings
from softteacher.data.images import PAD
from softteacher.data.loader import Batch, Views, pad
from softteacher.data.views import project_boxes, strong_view, weak_view
from softteacher.detections import Detections
from softteacher.detectors.build import build
from softteacher.detectors.losses import RoIs, classification_loss
from softteacher.methods import build_method
from softteacher.methods import soft_teacher as module
from softteacher.methods.base import Unlabeled
from softteacher.methods.soft_teacher import SoftTeacher
from softteacher.methods.supervised import Supervised
from tests.samples import TINY, noise_views

CLASSES = 3
TERMS = {"rpn_cls", "rpn_box", "cls", "box"}


def method(*overrides):
    torch.manual_seed(0)
    settings = load_settings("demo", [*TINY, *overrides])
    student = build(settings.detector, CLASSES)
    return build_method(settings, student, copy.deepcopy(student), dict.fromkeys("abc", 1.0))


def batch(seed=0):
    plain = noise_views(seed=seed)
    unlabeled = Views(plain.images, plain.sizes, plain.matrices, [], [], plain.seeds)
    return Batch(noise_views(seed=seed + 1), unlabeled, unlabeled)


def believe(soft_teacher, monkeypatch, boxes, scores, labels):
    """Make the teacher find these boxes in each view: B x [n, 4], the same scores and labels in all."""
    count = len(boxes)
    answer = torch.stack(boxes), torch.tensor([scores] * count), torch.tensor([labels] * count)

    def detect(features, sizes, training):
        assert training  # the numbers of proposals that training has, and no refinement
        return answer

    monkeypatch.setattr(soft_teacher.teacher, "detect", detect)


def the_pool(soft_teacher, weak, strong, to_strong):
    """The pseudo boxes of the first image."""
    features = soft_teacher.teacher.features(weak.images)
    boxes, scores, labels = soft_teacher.teacher.detect(features, weak.sizes, training=True)
    found = [Detections(*each) for each in zip(boxes, scores, labels, strict=True)]
    return soft_teacher.pseudo_boxes(found, Unlabeled(weak, strong, to_strong, features, weak.noise()))[0]


def test_a_state_from_a_checkpoint_moves_to_the_device():
    """Checkpoints are read to the CPU; `meta` stands for a GPU."""
    running, state = method(), method().state()
    running.frequency = running.frequency.to("meta")
    running.load_state(state)
    assert running.seen.device.type == "meta"


def test_the_method_by_its_name():
    assert isinstance(method(), SoftTeacher)
    assert isinstance(method("method.name=supervised"), Supervised)


def test_no_pseudo_boxes():
    """A fresh teacher is sure of nothing; all is background then, and every loss is finite."""
    soft_teacher = method()
    losses, facts = soft_teacher.losses(batch())
    assert set(losses) == TERMS | {f"unsup_{t}" for t in TERMS}
    assert all(torch.isfinite(v) for v in losses.values())
    assert [facts[f"pseudo_boxes_{k}"] for k in ("pool", "rpn", "cls", "reg")] == [0, 0, 0, 0]
    assert losses["unsup_box"] == losses["unsup_rpn_box"] == 0
    assert losses["unsup_cls"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in soft_teacher.student.parameters() if p.grad is not None)


def test_burn_in_is_supervised_training():
    labeled_only = Batch(batch().labeled)
    ours, facts = method().losses(labeled_only)
    theirs, _ = method("method.name=supervised").losses(batch())
    assert facts == {}
    assert set(ours) == set(theirs) == TERMS
    assert all(torch.equal(ours[k], theirs[k]) for k in TERMS)


@pytest.mark.parametrize(
    ("scores", "pool", "rpn", "cls"),
    [([0.95, 0.85, 0.7, 0.2], 3, 1, 2), ([0.5, 0.4, 0.3, 0.0], 0, 0, 0), ([0.99, 0.98, 0.97, 0.96], 4, 4, 4)],
)
def test_thresholds(monkeypatch, scores, pool, rpn, cls):
    soft_teacher = method("method.rpn_threshold=0.9", "method.cls_threshold=0.8", "method.reg_variance_threshold=1000")
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60], [5, 30, 25, 60], [30, 5, 60, 25]])
    believe(soft_teacher, monkeypatch, [boxes, boxes], scores, [0, 1, 2, 0])
    losses, facts = soft_teacher.losses(batch())
    assert [facts[f"pseudo_boxes_{k}"] for k in ("pool", "rpn", "cls", "reg")] == [pool, rpn, cls, pool]
    assert (losses["unsup_box"] > 0) == (pool > 0)
    none = method("method.reg_variance_threshold=0")
    believe(none, monkeypatch, [boxes, boxes], scores, [0, 1, 2, 0])
    assert none.losses(batch())[1]["pseudo_boxes_reg"] == 0


@pytest.mark.parametrize("positives", ["hard", "soft"])
@pytest.mark.parametrize("normalization", ["weights", "paper"])
@pytest.mark.parametrize("kind", ["teacher_background", "student_background", "iou", "none"])
def test_each_loss_gets_its_own_boxes_and_weights(monkeypatch, kind, normalization, positives):
    calls = {}

    def watched(name):
        real = getattr(module, name)

        def call(*arguments):
            result = real(*arguments)
            calls.setdefault(name, []).append((arguments, result))
            return result

        monkeypatch.setattr(module, name, call)

    for name in ("rpn_targets", "sample_rois", "classification_loss", "regression_loss"):
        watched(name)
    chosen = method(
        *("method.rpn_threshold=0.9", "method.cls_threshold=0.8", "method.reg_variance_threshold=none"),
        *(f"method.reliability={kind}", f"method.loss_normalization={normalization}", f"method.positives={positives}"),
    )
    weighed = []
    real = chosen.reliability
    monkeypatch.setattr(chosen, "reliability", lambda *a: weighed.append((a, real(*a))) or weighed[-1][1])
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60], [5, 30, 25, 60]])
    believe(chosen, monkeypatch, [boxes, boxes], [0.95, 0.85, 0.7], [0, 1, 2])
    losses, _ = chosen.losses(batch())

    assert [len(b) for b in calls["rpn_targets"][0][0][2]] == [1, 1]
    (for_cls, cls_rois), (for_reg, reg_rois) = calls["sample_rois"]
    assert [[len(b) for b in arguments[2]] for arguments in (for_cls, for_reg)] == [[2, 2], [3, 3]]
    (_, rois, weights, how, soft), cls = calls["classification_loss"][0]
    assert torch.equal(rois.labels, cls_rois.labels)
    (_, _, seen_boxes, _), expected = weighed[0]
    assert [len(d) for d in seen_boxes] == [2, 2]
    assert torch.equal(weights, expected)
    negative = rois.labels == CLASSES
    assert (weights[negative] < 1).any() == (kind != "none")
    assert how == normalization
    assert (soft is None) == (positives == "hard")
    torch.testing.assert_close(losses["unsup_cls"], chosen.settings.unsup_weight * cls)
    (deltas, taught, how), box = calls["regression_loss"][0]
    assert torch.equal(taught.labels, reg_rois.labels[reg_rois.labels < CLASSES])
    assert (len(deltas), how) == (len(taught.labels), normalization)
    assert 2 in taught.labels  # the class that doesn't teach the classification
    torch.testing.assert_close(losses["unsup_box"], chosen.settings.unsup_weight * box)


def test_pseudo_boxes_land_on_their_object(monkeypatch):
    """A red square is seen by the teacher in the weak view; its pseudo box covers it in the strong view."""
    data = load_settings("demo", ["data.strong_color=false", "data.strong_erase=false", "data.max_rotation=30"]).data
    soft_teacher, found = method(), 0
    truth = torch.tensor([[50, 40, 74, 70]])
    pixels = np.empty((100, 120, 3), np.uint8)
    pixels[:] = PAD
    pixels[40:70, 50:74] = (255, 0, 0)
    image = Image.fromarray(pixels)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        weak, strong = weak_view(image, rng, data), strong_view(image, rng, data)
        views = [
            Views(
                pad([np.asarray(v.image)]),
                torch.tensor([v.image.size[::-1]]),
                torch.from_numpy(v.matrix)[None],
                [],
                [],
                [0],
            )
            for v in (weak, strong)
        ]
        believe(soft_teacher, monkeypatch, [project_boxes(truth, views[0].matrices[0])], [0.95], [1])
        to_strong = views[1].matrices @ torch.linalg.inv(views[0].matrices)
        pool = the_pool(soft_teacher, *views, to_strong)
        red = np.asarray(strong.image, float)
        ys, xs = np.nonzero((red[..., 0] - red[..., 1]) / 255 > 0.5)
        if len(xs) and xs.min() > 0 and xs.max() < red.shape[1] - 1 and ys.min() > 0 and ys.max() < red.shape[0] - 1:
            seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(pool.detections.boxes[0], seen, atol=3.5)
            assert pool.detections.labels.tolist() == [1]
            assert pool.variance.shape == (1,)
            found += 1
    assert found > 6


def test_boxes_that_left_the_strong_view_are_dropped(monkeypatch):
    soft_teacher = method()
    boxes = torch.tensor([[2.0, 2, 20, 20], [40, 40, 60, 60]])
    believe(soft_teacher, monkeypatch, [boxes], [0.9, 0.95], [0, 1])
    monkeypatch.setattr(soft_teacher, "box_variance", lambda *a: [torch.tensor([0.1, 0.2])])
    views = noise_views(1)
    moved = torch.eye(3).double()[None].clone()
    moved[0, 0, 2] = -30  # the first box goes out on the left, half of the second stays
    pool = the_pool(soft_teacher, views, views, moved)
    assert pool.detections.boxes.tolist() == [[10, 40, 30, 60]]
    assert pool.found.boxes.tolist() == [[40, 40, 60, 60]]
    assert pool.found.labels.tolist() == pool.detections.labels.tolist() == [1]
    assert pool.variance.tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    "kind", ["teacher_background", "student_background", "prediction_difference", "iou", "reverse_iou", "none"]
)
def test_reliability(kind):
    """1 on positives, between 0 and 1 on negatives, and there what its name says."""
    soft_teacher = method(f"method.reliability={kind}")
    for p in soft_teacher.teacher.head_logits.parameters():  # teacher and student must not agree
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    weak = noise_views(2)
    boxes = [torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 50]]), torch.tensor([[1.0, 1, 20, 40]])]
    labels = torch.tensor([1, CLASSES, CLASSES])
    rois = RoIs(boxes, labels, torch.cat(boxes), torch.tensor(3.0), torch.tensor([0, -1, -1]))
    taught = [Detections(torch.tensor([[20.0, 20, 60, 70]]), torch.ones(1), torch.ones(1).long()), none_found()]
    with torch.no_grad():
        features = soft_teacher.teacher.features(weak.images)
        part = Unlabeled(weak, weak, torch.eye(3).double().repeat(2, 1, 1), features, weak.noise())
        logits = soft_teacher.student.box_head(features, boxes)[0]
        teacher = soft_teacher.teacher.box_head(features, boxes)[0].softmax(-1)[1:, -1]
        student = logits.softmax(-1)[1:, -1]
        weights = soft_teacher.reliability(rois, logits, taught, part)
    expected = {
        "teacher_background": teacher,
        "student_background": student,
        "prediction_difference": 1 - (student - teacher).abs(),
        "iou": torch.tensor([0.6, 0.0]),
        "reverse_iou": torch.tensor([0.4, 1.0]),
        "none": torch.ones(2),
    }[kind]
    assert weights[0] == 1
    torch.testing.assert_close(weights[1:], expected)


def test_the_teacher_looks_where_the_weak_view_shows_a_roi():
    """What the strong view has twice as large and shifted by (10, 4), and what it has as it is."""
    soft_teacher, weak = method(), noise_views(2)
    torch.nn.init.normal_(soft_teacher.teacher.head_logits.weight)
    grown = torch.tensor([[2.0, 0, 10], [0, 2, 4], [0, 0, 1]]).double()
    here = torch.tensor([[10.0, 10, 20, 20], [4, 20, 30, 60]])
    there = here * 2 + torch.tensor([10.0, 4, 10, 4])
    with torch.no_grad():
        features = soft_teacher.teacher.features(weak.images)
        part = Unlabeled(weak, weak, torch.stack([grown, torch.eye(3).double()]), features, weak.noise())
        found = soft_teacher.teacher_at([there, here], part)
        expected = soft_teacher.teacher.box_head(features, [here, here])[0].softmax(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_soft_positives(mixed):
    """A positive learns what the teacher sees there, a negative is background; of two images laid over each other the
    one counts that has an object there."""
    soft_teacher = method("method.positives=soft")
    for p in soft_teacher.teacher.head_logits.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    weak = noise_views(2)
    boxes = [torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 50]]), torch.tensor([[1.0, 1, 20, 40]])]
    rois = RoIs(boxes, torch.tensor([1, CLASSES, 2]), torch.cat(boxes), torch.tensor(3.0), torch.tensor([0, -1, 0]))
    with torch.no_grad():
        features = soft_teacher.teacher.features(weak.images)
        part = Unlabeled(weak, weak, torch.eye(3).double().repeat(2, 1, 1), features, weak.noise())
        mine, other = (
            soft_teacher.teacher.box_head(f, boxes)[0].softmax(-1) for f in (features, [f.flip(0) for f in features])
        )
        targets = soft_teacher.soft_targets(rois, part, mixed)
    assert targets[1].tolist() == [0, 0, 0, 1]
    for n in (0, 2):
        best = other if mixed and other[n, -1] < mine[n, -1] else mine
        torch.testing.assert_close(targets[n], best[n])
    logits = torch.randn(3, CLASSES + 1)
    expected = -(targets * logits.log_softmax(-1)).sum(1)
    torch.testing.assert_close(classification_loss(logits, rois, torch.ones(3), soft=targets), expected.mean())


def test_only_confident_boxes_teach_the_regression(monkeypatch):
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60], [5, 30, 25, 60]])
    counts = []
    for confident in (False, True):
        chosen = method(
            "method.cls_threshold=0.8", "method.reg_variance_threshold=1000", f"method.reg_confident={confident}"
        )
        believe(chosen, monkeypatch, [boxes, boxes], [0.95, 0.7, 0.6], [0, 1, 2])
        counts.append(chosen.losses(batch())[1]["pseudo_boxes_reg"])
    assert counts == [3, 1]
    none = method("method.cls_threshold=0.8", "method.reg_variance_threshold=0", "method.reg_confident=true")
    believe(none, monkeypatch, [boxes, boxes], [0.95, 0.7, 0.6], [0, 1, 2])
    assert none.losses(batch())[1]["pseudo_boxes_reg"] == 0


def test_unsure_boxes_are_no_background_to_the_rpn(monkeypatch):
    """With `rpn_ignore` what teaches the RPN doesn't change, but no anchor on another box of the pool is a negative."""
    seen = []
    real = module.rpn_targets
    monkeypatch.setattr(module, "rpn_targets", lambda *a: seen.append(a) or real(*a))
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60]])
    for ignore in ("false", "true"):
        chosen = method("method.rpn_threshold=0.9", f"method.rpn_ignore={ignore}")
        believe(chosen, monkeypatch, [boxes, boxes], [0.95, 0.6], [0, 1])
        chosen.losses(batch())
    assert [len(b) for call in seen for b in call[2]] == [1, 1, 1, 1]
    assert seen[0][5] is None
    assert [len(b) for b in seen[1][5]] == [2, 2]


def none_found():
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())


@pytest.mark.parametrize("name", ["soft_teacher", "mean_teacher", "supervised"])
def test_the_student_learns_and_the_teacher_never(monkeypatch, name):
    chosen = method(f"method.name={name}", "method.reg_variance_threshold=1000")
    if name != "supervised":
        boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60]])
        believe(chosen, monkeypatch, [boxes, boxes], [0.95, 0.92], [0, 1])
        teacher = chosen.teacher
        before = copy.deepcopy(teacher.state_dict())
        assert all(p.requires_grad for p in teacher.parameters())  # nothing but the method keeps it out
    losses, _ = chosen.losses(batch())
    unsupervised = [v for k, v in losses.items() if k.startswith("unsup_")] or list(losses.values())
    torch.stack(unsupervised).sum().backward()
    for key, p in chosen.student.named_parameters():
        assert p.grad is not None, key
    assert any(p.grad.abs().sum() > 0 for p in chosen.student.backbone.parameters())
    if name != "supervised":
        assert all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_losses_in_half_precision(monkeypatch, precision, tolerance):
    """Each term is within 5 % (bf16) or 1 % (fp16) of fp32; assignment and sampling stay in fp32."""
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60]])
    found = []
    for chosen in (torch.float32, precision):
        soft_teacher = method("method.reg_variance_threshold=1000")
        soft_teacher.student.precision = soft_teacher.teacher.precision = chosen
        believe(soft_teacher, monkeypatch, [boxes, boxes], [0.95, 0.92], [0, 1])
        losses, _ = soft_teacher.losses(batch())
        assert all(v.dtype == torch.float32 for v in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        found.append({k: v.item() for k, v in losses.items()})
    assert found[1] == pytest.approx(found[0], rel=tolerance)
