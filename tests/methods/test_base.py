"""What all methods with a teacher share: pseudo boxes reach the student where its view shows them, and are counted."""

from dataclasses import replace

import pytest
import torch

from softteacher.detections import Detections
from softteacher.detectors.boxes import HEAD_STD, encode
from softteacher.methods import base
from softteacher.methods.thresholds import FEWEST
from tests.methods import test_one_stage as one_stage
from tests.methods import test_soft_teacher as two_stage

CLASSES = 3
BOXES = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60], [5, 30, 25, 60], [30, 5, 60, 25]])
SHRUNK = torch.tensor([[0.5, 0, 3], [0, 0.5, -1], [0, 0, 1]]).double()  # original image -> weak view
GROWN = torch.tensor([[0.6, 0, 5], [0, 0.6, 2], [0, 0, 1]]).double()  # original image -> strong view
# 1.2 times as large, then what is left of the shift: 5 - 1.2 * 3, 2 + 1.2 * 1
IN_STRONG = BOXES * 1.2 + torch.tensor([1.4, 3.2, 1.4, 3.2])


def moved_batch():
    """Weak and strong views which show the image at other scales and places."""
    parts = two_stage.batch()
    weak, strong = (replace(parts.weak, matrices=m.repeat(2, 1, 1)) for m in (SHRUNK, GROWN))
    return replace(parts, weak=weak, strong=replace(strong, sizes=torch.full((2, 2), 128)))


def believe(chosen, monkeypatch, scores):
    two_stage.believe(chosen, monkeypatch, [BOXES] * 2, scores, [0, 1, 2, 0])


def taught(monkeypatch, make, *overrides):
    """The pseudo boxes of both images as a method's unsupervised losses get them from the weak into the strong view."""
    carried, real = [], base.to_strong_view
    for module in ("soft_teacher", "mean_teacher"):
        monkeypatch.setattr(
            f"softteacher.methods.{module}.to_strong_view", lambda *a: carried.append(real(*a)) or carried[-1]
        )
    chosen = make("method.cls_threshold=0.8", "method.reg_variance_threshold=1000", *overrides)
    believe(chosen, monkeypatch, [0.95, 0.95, 0.95, 0.95])
    return chosen, carried


@pytest.mark.parametrize("name", ["soft_teacher", "mean_teacher"])
@pytest.mark.parametrize("make", [two_stage.method, one_stage.method])
def test_pseudo_boxes_are_carried_from_the_weak_to_the_strong_view(monkeypatch, make, name):
    chosen, carried = taught(monkeypatch, make, f"method.name={name}")
    chosen.losses(moved_batch())
    assert len(carried) == 2
    for found, _ in carried:
        torch.testing.assert_close(found.boxes, IN_STRONG)


def test_hard_pseudo_boxes_teach_where_the_strong_view_shows_them(monkeypatch):
    chosen, _ = taught(monkeypatch, two_stage.method, "method.name=mean_teacher")
    seen, real = [], chosen.student.losses
    monkeypatch.setattr(chosen.student, "losses", lambda views: seen.append(views) or real(views))
    chosen.losses(moved_batch())
    _, views = seen
    for boxes, labels in zip(views.boxes, views.labels, strict=True):
        torch.testing.assert_close(boxes, IN_STRONG)
        assert labels.tolist() == [0, 1, 2, 0]


def test_without_reliability_the_classification_is_the_mean_teachers(monkeypatch):
    """Two images whose RoIs stand in turn with those of the regression: each logit meets the label of its own RoI."""
    found = []
    hard = ["method.reliability=none", "method.positives=hard", "method.rpn_ignore=false", "method.rpn_threshold=0.8"]
    hard.append("method.box_jitter=false")  # draws from the noise of the images
    for name in ("soft_teacher", "mean_teacher"):
        chosen, _ = taught(monkeypatch, two_stage.method, f"method.name={name}", *hard)
        # opinions that differ between RoIs
        torch.nn.init.normal_(chosen.student.head_logits.weight, std=0.5)
        torch.nn.init.normal_(chosen.student.head_deltas.weight, std=0.5)
        found.append(chosen.losses(moved_batch())[0])
    for key in ("unsup_rpn_cls", "unsup_rpn_box", "unsup_cls"):
        torch.testing.assert_close(found[0][key], found[1][key])


def test_boxes_of_the_regression_meet_their_own_deltas(monkeypatch):
    """A head that refines each RoI to its object, and no other, has no loss."""
    chosen, _ = taught(monkeypatch, two_stage.method, "method.box_jitter=false")
    both = [BOXES, BOXES.flip(0)]  # one image's deltas don't fit the other's RoIs
    two_stage.believe(chosen, monkeypatch, both, [0.95, 0.95, 0.95, 0.95], [0, 1, 2, 0])
    real, seen = chosen.student.box_head, []

    def head(features, rois):
        logits, _ = real(features, rois)
        flat = torch.cat(rois)
        own = IN_STRONG[torch.cdist(flat, IN_STRONG).argmin(1)]
        seen.append(len(flat))
        return logits, encode(own, flat, HEAD_STD)[:, None].expand(-1, CLASSES, -1)

    monkeypatch.setattr(chosen.student, "box_head", head)
    near = IN_STRONG + torch.tensor([2.0, -1, 1, 2])
    monkeypatch.setattr(
        chosen.student, "proposals", lambda rpn, sizes, training: (torch.stack([near, near.flip(0)]), torch.ones(2, 4))
    )
    losses, _ = chosen.losses(replace(moved_batch(), labeled=None))
    assert seen[-1] >= 16
    assert losses["unsup_box"].item() == pytest.approx(0, abs=1e-5)


def test_adaptive_thresholds_follow_what_the_teacher_finds(monkeypatch):
    """One box of each class an image is labelled: after enough images the second box of a class doesn't teach, the
    unsure first ones do. All of it goes into a checkpoint."""
    chosen = two_stage.method("method.threshold=adaptive", "method.adaptive_share=1", "method.pool_threshold=0.05")
    scores, labels = torch.tensor([0.6, 0.3, 0.2, 0.5]), torch.tensor([0, 1, 2, 0])
    boxes = Detections(BOXES, scores, labels)
    believe(chosen, monkeypatch, scores.tolist())
    monkeypatch.setattr(chosen.teacher, "features", lambda images: [])
    monkeypatch.setattr(chosen, "unsupervised_losses", lambda found, part: ({}, {}))
    one = replace(two_stage.batch(), labeled=None)
    for _ in range(FEWEST // 2):
        assert not len(chosen.confident(boxes, 0.9))
        _, facts = chosen.losses(one)
    assert chosen.confident(boxes, 0.9).labels.tolist() == [0, 1, 2]
    assert facts["adaptive_threshold"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert chosen.seen.tolist() == [2, 2, 2]

    resumed = two_stage.method("method.threshold=adaptive", "method.adaptive_share=1", "method.pool_threshold=0.05")
    resumed.load_state(chosen.state())
    assert resumed.seen.tolist() == [2, 2, 2]
    assert resumed.confident(boxes, 0.9).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["soft_teacher", "mean_teacher", "stac"])
def test_the_weight_of_the_unlabelled_images(monkeypatch, name):
    """`method.unsup_weight` times `trust` times what the losses would be alone; without trust they are left out."""
    found = []
    for weight, trust in ((1.0, 1.0), (4.0, 0.5), (4.0, 0.0)):
        chosen = two_stage.method(f"method.name={name}", f"method.unsup_weight={weight}")
        chosen.trust = trust
        parts = two_stage.batch()
        labelled = replace(parts.strong, boxes=[BOXES] * 2, labels=[torch.tensor([0, 1, 2, 0])] * 2)
        if name == "stac":
            parts = replace(parts, strong=labelled)
        else:
            believe(chosen, monkeypatch, [0.95, 0.95, 0.95, 0.95])
        found.append(chosen.losses(parts)[0])
    terms = {k for k in found[0] if k.startswith("unsup_")}
    assert len(terms) == 4
    for key in terms:
        assert found[0][key] > 0
        torch.testing.assert_close(2 * found[0][key], found[1][key])
    assert not terms & set(found[2])
