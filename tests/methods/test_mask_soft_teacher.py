"""Soft Teacher with masks: the teacher's mask lies on its object in the student's view, and the student learns it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import roi_align

from softteacher.config import load_settings
from softteacher.data.images import PAD
from softteacher.data.loader import Batch
from softteacher.data.views import strong_view, weak_view
from softteacher.detectors.build import build
from softteacher.detectors.mask_rcnn import MASK_SIDE, mask_targets
from softteacher.methods import build_method
from softteacher.methods.mask_soft_teacher import MaskSoftTeacher, pseudo_mask_targets
from softteacher.methods.soft_teacher import SoftTeacher
from softteacher.training.trainer import Trainer
from tests.methods.test_soft_teacher import believe
from tests.samples import MASK_TINY, TINY, noise_views, shape_views

CORNERS = ((40, 30), (130, 40), (90, 75), (100, 120), (50, 110))


def marked():
    image = Image.new("RGB", (180, 150), PAD)
    ImageDraw.Draw(image).polygon(CORNERS, fill=(255, 0, 0))
    return image


def seen(view):
    """Where the marker is in a view, [H, W] bool, and the box around it, [1, 4]."""
    red = torch.from_numpy(np.asarray(view.image, np.float32))
    mask = (red[..., 0] - red[..., 1]) / 255 > 0.5
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return mask, torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()[None]


@pytest.mark.parametrize("shift", [(0, 0), (9, -6)])
def test_masks_follow_the_views(shift):
    """The mask of the weak view, read in the strong one, is what is seen there: flips, scales, rotation, shear."""
    overrides = ["data.strong_color=false", "data.strong_erase=false", "data.short_side=150"]
    data, seeds = load_settings(None, [*overrides, "data.scale_jitter=[0.8, 1.2]"]).data, range(30)
    flips, turns, none = 0, 0, torch.zeros(1).long()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        weak, strong = weak_view(marked(), rng, data), strong_view(marked(), rng, data)
        weak_mask, weak_box = seen(weak)
        strong_mask, roi = seen(strong)
        roi = roi + torch.tensor([*shift, *shift])  # a RoI that is not quite where the object is
        # soft, as the teacher's: the share of each cell that is covered
        frame = torch.cat([torch.zeros(1, 1), weak_box], 1)
        probabilities = roi_align(weak_mask[None, None].float(), frame, MASK_SIDE, 1.0, 0, aligned=True)[:, 0]
        to_strong = torch.from_numpy(strong.matrix @ np.linalg.inv(weak.matrix))
        found = pseudo_mask_targets(roi, weak_box, probabilities, to_strong)
        truth = mask_targets(strong_mask[None], roi, none)
        assert found.shape == (1, MASK_SIDE, MASK_SIDE)
        assert (found & truth).sum() / (found | truth).sum() > 0.9
        flips += bool(to_strong[0, 0] < 0)
        turns += bool(to_strong[0, 1].abs() > 0.1)
    assert flips > 5
    assert turns > 5


def test_nothing_lies_outside_of_the_pseudo_box():
    roi, box = torch.tensor([[0.0, 0, 56, 56]]), torch.tensor([[14.0, 28, 42, 56]])
    found = pseudo_mask_targets(roi, box, torch.ones(1, 28, 28), torch.eye(3).double())
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[14:, 7:21] = True
    assert (found[0] == expected).all()


def test_no_pseudo_boxes():
    none = pseudo_mask_targets(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 28, 28), torch.eye(3).double())
    assert none.shape == (0, 28, 28)


def method(*overrides, base=MASK_TINY):
    torch.manual_seed(0)
    settings = load_settings("demo", [*base, *overrides])
    student = build(settings.detector, 2)
    return build_method(settings, student, copy.deepcopy(student), {"a": 1.0, "b": 1.0}), settings


def batch():
    plain = noise_views()
    plain.boxes, plain.labels = [], []
    return Batch(shape_views(), plain, plain)


def test_the_detector_decides():
    assert type(method()[0]) is MaskSoftTeacher
    assert type(method(base=TINY)[0]) is SoftTeacher


@pytest.mark.parametrize(("score", "taught"), [(0.95, True), (0.85, False)])
def test_masks_of_sure_boxes_teach(monkeypatch, score, taught):
    chosen, _ = method("method.cls_threshold=0.9", "method.unsup_weight=3")
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60]])
    believe(chosen, monkeypatch, [boxes, boxes], [score, 0.6], [1, 0])
    losses, _ = chosen.losses(batch())
    assert set(losses) == {f"{p}{t}" for p in ("", "unsup_") for t in ("rpn_cls", "rpn_box", "cls", "box", "mask")}
    assert losses["mask"] > 0
    assert bool(losses["unsup_mask"] > 0) == taught
    if taught:  # a fresh head says .5 everywhere, so whatever the target is the loss is log 2
        assert losses["unsup_mask"].item() == pytest.approx(3 * np.log(2), rel=0.02)
    losses["unsup_mask"].backward()
    assert any(p.grad.any() for p in chosen.student.mask_convs.parameters()) == taught
    assert all(p.grad is None for p in chosen.teacher.parameters())


@pytest.mark.parametrize("flipped", [False, True])
def test_the_target_is_the_teachers_mask(monkeypatch, flipped):
    """The teacher draws the left half of its box: the student that draws that half of the object has no loss."""
    chosen, _ = method("method.cls_threshold=0.9", "method.unsup_weight=1")
    box, drawn = torch.tensor([[8.0, 8, 40, 40]]), torch.full((28, 28), -20.0)
    drawn[:, :14] = 20
    believe(chosen, monkeypatch, [box, box], [0.95], [1])
    monkeypatch.setattr(chosen.teacher, "mask_head", lambda f, b, labels: drawn.expand(len(labels), -1, -1))
    # only the pseudo box itself is positive
    none = torch.zeros(2, 1, 4), torch.zeros(2, 1)
    monkeypatch.setattr(chosen.student, "proposals", lambda rpn, sizes, training: none)
    parts = batch()
    if flipped:
        flip = torch.tensor([[-1.0, 0, 64], [0, 1, 0], [0, 0, 1]]).double()
        parts.strong = replace(parts.strong, matrices=flip.repeat(2, 1, 1))
    for mine, right in ((drawn, not flipped), (drawn.flip(1), flipped)):
        monkeypatch.setattr(
            chosen.student, "mask_head", lambda f, b, labels, mine=mine: mine.expand(len(labels), -1, -1)
        )
        loss = chosen.losses(parts)[0]["unsup_mask"]
        assert loss < 1e-6 if right else loss == pytest.approx(20)


def test_a_step_of_training():
    low = [f"method.{key}_threshold=0.01" for key in ("pool", "rpn", "cls")]
    chosen, settings = method(*low, "method.reg_variance_threshold=9", "detector.score_threshold=0.01")
    trainer = Trainer(chosen.student, chosen.teacher, chosen, settings, torch.device("cpu"))
    for _ in range(2):  # at the first the warm-up has hardly begun
        before = copy.deepcopy(chosen.student.state_dict())
        numbers = trainer.step([batch()])
    assert trainer.progress.skipped == 0
    assert numbers["pseudo_boxes_cls"] > 0
    assert numbers["unsup_mask"] > 0
    moved = {k.split(".")[0] for k, v in chosen.student.state_dict().items() if not torch.equal(v, before[k])}
    assert {"mask_convs", "mask_logits", "head", "backbone", "fpn"} <= moved
