"""Soft Teacher for a one-stage detector: pseudo boxes, weights of negatives, spread of boxes, one step of training."""

import copy

import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Batch, Views
from softteacher.data.views import project_boxes
from softteacher.detections import Detections
from softteacher.detectors.build import build
from softteacher.detectors.fcos import Dense, box_losses, dense_targets, focal_loss, grid
from softteacher.methods import build_method
from softteacher.methods.base import Unlabeled
from softteacher.methods.mean_teacher import MeanTeacher
from softteacher.methods.one_stage import OneStageSoftTeacher, look_up
from softteacher.methods.supervised import Supervised
from softteacher.training.trainer import Trainer
from tests.samples import TINY, noise_views

CLASSES = 3
TERMS = {"cls", "box", "centerness"}
SHAPES = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]  # of the levels of 64 x 64 pixels
BOXES = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60], [5, 30, 25, 60], [30, 5, 60, 25]])
LOCATIONS, STRIDES = grid(SHAPES, torch.device("cpu"))
USED = (LOCATIONS < 64).all(1)
FLIP = torch.tensor([[-1.0, 0, 64], [0, 1, 0], [0, 0, 1]]).double()


def method(*overrides):
    torch.manual_seed(0)
    settings = load_settings("demo", [*TINY, "detector.name=fcos_tiny_fpn", "detector.head_convs=1", *overrides])
    student = build(settings.detector, CLASSES)
    torch.nn.init.normal_(student.head_logits.weight, std=0.2)  # opinions that differ between places
    return build_method(settings, student, copy.deepcopy(student), dict.fromkeys("abc", 1.0))


def batch(seed=0):
    plain = noise_views(seed=seed)
    unlabeled = Views(plain.images, plain.sizes, plain.matrices, [], [], plain.seeds)
    return Batch(noise_views(seed=seed + 1), unlabeled, unlabeled)


def believe(chosen, monkeypatch, scores, labels=(0, 1, 2, 0)):
    """Make the teacher find `BOXES` in each of two views."""
    answer = BOXES.expand(2, 4, 4), torch.tensor([scores] * 2), torch.tensor([list(labels)] * 2)

    def detect(features, sizes, training):
        assert training
        return answer

    monkeypatch.setattr(chosen.teacher, "detect", detect)


def answers(boxes):
    """Predictions [1, L] with these boxes, [L, 4]."""
    return Dense(
        torch.zeros(1, len(boxes), CLASSES), boxes[None], torch.zeros(1, len(boxes)), LOCATIONS, STRIDES, SHAPES
    )


def test_the_method_of_the_detector():
    assert isinstance(method(), OneStageSoftTeacher)
    assert isinstance(method("method.name=supervised"), Supervised)
    assert isinstance(method("method.name=mean_teacher"), MeanTeacher)


@pytest.mark.parametrize(
    ("scores", "pool", "cls"), [([0.95, 0.85, 0.7, 0.2], 3, 2), ([0.5, 0.4, 0.3, 0.0], 0, 0), ([0.99] * 4, 4, 4)]
)
def test_thresholds(monkeypatch, scores, pool, cls):
    for variance, reg in ((1000, pool), (0, 0)):
        chosen = method("method.cls_threshold=0.8", f"method.reg_variance_threshold={variance}")
        believe(chosen, monkeypatch, scores)
        losses, facts = chosen.losses(batch())
        assert set(losses) == TERMS | {f"unsup_{t}" for t in TERMS}
        assert all(torch.isfinite(v) for v in losses.values())
        assert [facts[f"pseudo_boxes_{k}"] for k in ("pool", "cls", "reg")] == [pool, cls, reg]
        assert (losses["unsup_box"] > 0) == (losses["unsup_centerness"] > 0) == (reg > 0)
        assert losses["unsup_cls"] > 0
        assert 0 < facts["reliability"] < 1


def test_without_reliability_and_variance_it_is_the_mean_teacher(monkeypatch):
    """With weights of 1 and the same boxes for every term the terms are `student.losses` on these boxes."""
    found = []
    for name in ("soft_teacher", "mean_teacher"):
        hard = ("method.reliability=none", "method.box_jitter=false", "method.cls_threshold=0.8")
        chosen = method(f"method.name={name}", *hard)
        believe(chosen, monkeypatch, [0.9, 0.9, 0.9, 0.7])
        found.append(chosen.losses(batch()))
    (ours, facts), (theirs, _) = found
    assert set(ours) == set(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])
    assert facts["reliability"] == 1
    assert facts["pseudo_boxes_cls"] == facts["pseudo_boxes_reg"] == 3


def test_terms_have_pseudo_boxes_and_weights_of_their_own(monkeypatch):
    """The classification learns from sure boxes with soft negatives, the regression from boxes of little variance."""
    chosen = method("method.cls_threshold=0.8", "method.reg_variance_threshold=0.1", "method.unsup_weight=1")
    believe(chosen, monkeypatch, [0.95, 0.85, 0.7, 0.6])
    values = torch.tensor([0.5, 0.01, 0.02, 0.5])
    monkeypatch.setattr(chosen, "box_variance", lambda features, found, sizes, noise: [values] * 2)
    views = batch()
    losses, facts = chosen.losses(views)
    with torch.no_grad():
        dense = chosen.student.predict(chosen.student.features(views.strong.images))
    labels = torch.tensor([0, 1, 2, 0])

    def targets(keep):
        return dense_targets(
            LOCATIONS, STRIDES, views.strong.sizes, [BOXES[keep]] * 2, [labels[keep]] * 2, CLASSES
        )  # fmt: skip

    sure, still = targets([0, 1]), targets([1, 2])
    background = 1 - dense.logits.sigmoid().amax(-1)  # the teacher is a copy that sees the same view
    negative = sure.labels == CLASSES
    expected = focal_loss(dense.logits, sure, torch.where(negative, background, 1))
    torch.testing.assert_close(losses["unsup_cls"].detach(), expected, rtol=1e-4, atol=1e-5)
    for key, value in box_losses(dense, still).items():
        torch.testing.assert_close(losses[f"unsup_{key}"].detach(), value)
    assert facts["reliability"] == pytest.approx(background[negative & USED].mean().item(), rel=1e-3)
    assert facts["pseudo_boxes_cls"] == facts["pseudo_boxes_reg"] == 2


@pytest.mark.parametrize("flip", [False, True])
def test_negatives_weigh_what_the_teacher_sees_at_their_place(flip):
    """Under a flip the mirrored cell's own value; cells of the highest level are centred outside of 64 pixels."""
    chosen, weak = method(), noise_views(2)
    with torch.no_grad():
        features = chosen.teacher.features(weak.images)
        seen = chosen.teacher.predict(features)
        to_strong = (FLIP if flip else torch.eye(3).double()).repeat(2, 1, 1)
        part = Unlabeled(weak, weak, to_strong, features, weak.noise())
        weights = chosen.reliability(seen, [Detections(BOXES, None, None)] * 2, part)
    background = 1 - seen.logits.sigmoid().amax(-1)
    assert background.std() > 0.05
    if flip:
        levels = [part.unflatten(1, shape).flip(-1).flatten(1) for part, shape in _levels(background)]
        background = torch.cat(levels, 1)
    torch.testing.assert_close(weights[:, USED], background[:, USED], atol=1e-5, rtol=1e-5)


def _levels(values):
    return list(zip(values.split([h * w for h, w in SHAPES], 1), SHAPES, strict=True))


def test_a_shifted_negative_weighs_what_the_teacher_sees_where_it_came_from():
    """The strong view shows all a cell of the finest level further right."""
    chosen, weak = method(), noise_views(1)
    shift = torch.tensor([[1.0, 0, 8], [0, 1, 0], [0, 0, 1]]).double()[None]
    with torch.no_grad():
        features = chosen.teacher.features(weak.images)
        seen = chosen.teacher.predict(features)
        weights = chosen.reliability(seen, [], Unlabeled(weak, weak, shift, features, weak.noise()))
    (background, shape), (found, _) = (_levels(x)[0] for x in (1 - seen.logits.sigmoid().amax(-1), weights))
    torch.testing.assert_close(found.unflatten(1, shape)[..., 1:], background.unflatten(1, shape)[..., :-1])


@pytest.mark.parametrize(("zoom", "level"), [(1.0, 0), (0.5, 1), (2.0, -1), (0.8, 0), (0.25, 2), (8.0, -3)])
def test_a_view_of_another_size_is_read_at_another_level(zoom, level):
    """Where the strong view is a `zoom`ed weak view a cell's place is read at the level that covers the same."""
    values = torch.repeat_interleave(torch.arange(5.0), torch.tensor([h * w for h, w in SHAPES]))[None]
    dense = answers(torch.zeros(len(LOCATIONS), 4))
    back = torch.diag(torch.tensor([1 / zoom, 1 / zoom, 1.0])).double()[None]
    found = look_up(values, SHAPES, dense, back, torch.tensor([[64, 64]]))
    own = (STRIDES / 8).log2()
    torch.testing.assert_close(found[0], (own + level).clamp(0, 4))


def test_values_are_interpolated_and_held_at_the_edge():
    """A linear ramp of each level is read exactly, at rotated and shifted places; outside it is that of the edge."""
    ramp = (LOCATIONS[:, 0] + 2 * LOCATIONS[:, 1])[None].repeat(1, 1)
    dense = answers(torch.zeros(len(LOCATIONS), 4))
    matrix = torch.tensor([[0.9, -0.3, 9.0], [0.3, 0.9, -5.0], [0, 0, 1]]).double()
    found = look_up(ramp, SHAPES, dense, matrix[None], torch.tensor([[64, 64]]))[0]
    places = LOCATIONS.double() @ matrix[:2, :2].T + matrix[:2, 2]
    level = STRIDES == 8
    held = places.clamp(4, 60)[level]  # the outermost cells' centres
    torch.testing.assert_close(found[level].double(), held[:, 0] + 2 * held[:, 1], atol=1e-3, rtol=1e-4)


def test_other_reliabilities():
    """Teacher and student of other weights, so that each kind has another answer."""
    found, weak = {}, noise_views(1)
    for kind in ("teacher_background", "student_background", "prediction_difference", "iou", "reverse_iou", "none"):
        chosen = method(f"method.reliability={kind}")
        torch.nn.init.normal_(chosen.student.head_logits.weight, std=0.2)
        with torch.no_grad():
            dense = chosen.student.predict(chosen.student.features(weak.images))
            features = chosen.teacher.features(weak.images)
            pseudo = [Detections(BOXES, None, None)]
            part = Unlabeled(weak, weak, torch.eye(3).double()[None], features, weak.noise())
            found[kind] = chosen.reliability(dense, pseudo, part)[:, USED]
        assert (found[kind] >= 0).all()
        assert (found[kind] <= 1).all()
    student, teacher = found["student_background"], found["teacher_background"]
    assert (student - teacher).abs().max() > 0.1
    torch.testing.assert_close(student, 1 - dense.logits.sigmoid().amax(-1)[:, USED])
    torch.testing.assert_close(found["prediction_difference"], 1 - (student - teacher).abs())
    torch.testing.assert_close(found["iou"], 1 - found["reverse_iou"])
    assert found["iou"].max() > 0.05
    assert (found["none"] == 1).all()


def test_variance_grows_with_the_spread(monkeypatch):
    """0 where all locations near the object say the same; of a known spread it is the known number."""
    chosen = method("method.jitter_times=4")
    box = torch.tensor([[10.0, 10, 50, 40]])
    found, sizes = [Detections(box, torch.tensor([0.9]), torch.tensor([1]))], torch.tensor([[64, 64]])
    spread = torch.tensor([-3.0, -1, 1, 3])[:, None] * torch.tensor([1.0, 1, 1, 1])
    values = []
    for scale in (0.0, 0.5, 1.0):
        boxes = torch.tensor([[0.0, 0, 5, 5]]).repeat(len(LOCATIONS), 1)  # elsewhere
        boxes[[20, 21, 28, 29]] = box + scale * spread
        monkeypatch.setattr(chosen.teacher, "predict", lambda features, boxes=boxes: answers(boxes))
        values.append(chosen.box_variance([], found, sizes, [])[0].item())
    assert values[0] == pytest.approx(0, abs=1e-6)
    deviation = (20 / 3) ** 0.5
    assert values[2] == pytest.approx((deviation / 40 + deviation / 30) / 2, rel=1e-4)
    assert values[1] == pytest.approx(values[2] / 2, rel=1e-4)
    paper = method("method.jitter_times=4", "method.variance_normalization=mean_side")
    monkeypatch.setattr(paper.teacher, "predict", chosen.teacher.predict)
    assert paper.box_variance([], found, sizes, [])[0].item() == pytest.approx(deviation / 35, rel=1e-4)
    none = [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())]
    assert chosen.box_variance([], none, sizes, [])[0].shape == (0,)


def test_variance_ignores_the_padding(monkeypatch):
    chosen = method("method.jitter_times=2")
    boxes = torch.tensor([[0.0, 0, 5, 5]]).repeat(len(LOCATIONS), 1)
    boxes[0], boxes[1], boxes[7] = torch.tensor([[10.0, 10, 30, 40], [10, 10, 30, 30], [10, 10, 30, 40]])
    monkeypatch.setattr(chosen.teacher, "predict", lambda features: answers(boxes))
    found = [Detections(boxes[:1], torch.tensor([0.9]), torch.tensor([1]))]
    whole = chosen.box_variance([], found, torch.tensor([[64, 64]]), [])[0]
    padded = chosen.box_variance([], found, torch.tensor([[64, 48]]), [])[0]
    assert whole.item() == pytest.approx(0, abs=1e-6)  # places 0 and 7 agree
    assert padded.item() > 0.05  # place 7 lies in the padding


def test_pseudo_boxes_land_in_the_strong_view():
    chosen, views = method(), noise_views()
    with torch.no_grad():
        features = chosen.teacher.features(views.images)
        found = [Detections(BOXES, torch.full((4,), 0.95), torch.tensor([0, 1, 2, 0]))] * 2
        pool = chosen.pseudo_boxes(found, Unlabeled(views, views, FLIP.repeat(2, 1, 1), features, views.noise()))
    for p in pool:
        torch.testing.assert_close(p.detections.boxes, project_boxes(BOXES, FLIP))
        assert p.variance.shape == (4,)


def test_mixed_views_have_the_boxes_of_both_and_background_is_background_in_both(monkeypatch):
    losses, shares = [], []
    for mixup in (0, 1):
        chosen = method(f"method.mixup={mixup}", "method.cls_threshold=0.5", "method.reg_variance_threshold=1000")
        believe(chosen, monkeypatch, [0.95, 0.92, 0, 0])
        values, facts = chosen.losses(batch())
        losses.append(values)
        shares.append(facts["reliability"])
        assert facts["pseudo_boxes_cls"] == facts["pseudo_boxes_reg"] == 2  # of an image, mixed or not
    assert all(torch.isfinite(v) for v in losses[1].values())
    assert shares[1] == pytest.approx(shares[0] ** 2, rel=0.1)  # a product of two, of much the same noise
    assert all(torch.equal(losses[0][t], losses[1][t]) for t in TERMS)


def test_a_step_of_training(monkeypatch):
    """Student and teacher move, by the trainer that knows nothing of the detector; only the student has gradients."""
    settings = load_settings("demo", [*TINY, "training.precision=fp32"])
    chosen = method("method.reg_variance_threshold=1000")
    chosen.teacher.requires_grad_(False)
    believe(chosen, monkeypatch, [0.95, 0.92, 0.9, 0.9])
    trainer = Trainer(chosen.student, chosen.teacher, chosen, settings, torch.device("cpu"))
    before = {k: v.clone() for k, v in chosen.student.state_dict().items()}
    numbers = [trainer.step([batch(n)]) for n in range(2)]
    assert {f"unsup_{t}" for t in TERMS} | {"loss", "pseudo_boxes_cls", "reliability"} <= set(numbers[0])
    assert trainer.progress.skipped == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in chosen.student.parameters())
    assert all(p.grad is None for p in chosen.teacher.parameters())
    for detector in (chosen.student, chosen.teacher):
        moved = [k for k, v in detector.state_dict().items() if not torch.equal(v, before[k])]
        assert len(moved) > 0.8 * len(before)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_losses_in_half_precision(monkeypatch, precision, tolerance):
    found = []
    for kind in (torch.float32, precision):
        chosen = method("method.reg_variance_threshold=1000")
        chosen.student.precision = chosen.teacher.precision = kind
        believe(chosen, monkeypatch, [0.95, 0.92, 0.9, 0.9])
        losses, _ = chosen.losses(batch())
        assert all(v.dtype == torch.float32 for v in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        found.append({k: v.item() for k, v in losses.items()})
    assert found[1] == pytest.approx(found[0], rel=tolerance)
