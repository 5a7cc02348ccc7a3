"""Mixup of strong views: pictures, boxes and the teacher's background score of both halves."""

import copy
from dataclasses import replace

import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Batch
from softteacher.detections import Detections
from softteacher.detectors.build import build
from softteacher.detectors.losses import RoIs
from softteacher.errors import UserError
from softteacher.methods import build_method
from softteacher.methods.base import PseudoBoxes, Unlabeled
from softteacher.methods.mixing import mix_boxes, mix_views, other_half
from tests.samples import TINY, noise_views


def method(*overrides, name="fasterrcnn_tiny_fpn"):
    torch.manual_seed(0)
    settings = load_settings("demo", [*TINY, f"detector.name={name}", *overrides])
    student = build(settings.detector, 3)
    return build_method(settings, student, copy.deepcopy(student), dict.fromkeys("abc", 1.0))


def test_pictures_and_sizes():
    views = noise_views(3)
    views.sizes = torch.tensor([[64, 40], [48, 64], [32, 32]])
    mixed = mix_views(views)
    for n, other in enumerate((2, 0, 1)):
        mean = (views.images[n].float() + views.images[other].float()) / 2
        assert (mixed.images[n].float() - mean).abs().max() <= 0.5
    assert mixed.images.dtype == torch.uint8
    assert mixed.sizes.tolist() == [[64, 40], [64, 64], [48, 64]]


@pytest.mark.parametrize("jitter", [True, False])
def test_boxes(jitter):
    def pseudo(n, count):
        d = Detections(torch.full((count, 4), float(n)), torch.full((count,), n / 10), torch.full((count,), n))
        found = replace(d, boxes=d.boxes + 10)  # in the weak view
        return PseudoBoxes(d, torch.full((count,), n / 100) if jitter else None, found)

    mixed = mix_boxes([pseudo(0, 1), pseudo(1, 2), pseudo(2, 0)])
    assert [p.detections.labels.tolist() for p in mixed] == [[0], [1, 1, 0], [1, 1]]
    assert [p.found.labels.tolist() for p in mixed] == [[0], [1, 1, 0], [1, 1]]
    for p in mixed:
        of = p.detections.labels.float()
        torch.testing.assert_close(p.detections.boxes, of[:, None].expand(-1, 4))
        torch.testing.assert_close(p.found.boxes, of[:, None].expand(-1, 4) + 10)
        torch.testing.assert_close(p.detections.scores, of / 10)
        if jitter:
            torch.testing.assert_close(p.variance, of / 100)
        else:
            assert p.variance is None


def test_the_other_half_is_where_the_teacher_saw_it():
    """Under the identity, the weight of a RoI in the other half is the teacher's score on the picture laid over."""
    chosen, weak = method(), noise_views(2)
    boxes = [torch.tensor([[4.0, 4, 30, 30]]), torch.tensor([[1.0, 1, 20, 40]])]
    rois = RoIs(boxes, torch.tensor([3, 3]), torch.cat(boxes), torch.tensor(2.0), torch.tensor([-1, -1]))
    with torch.no_grad():
        features = chosen.teacher.features(weak.images)
        part = Unlabeled(weak, weak, torch.eye(3).double().repeat(2, 1, 1), features, weak.noise())
        weights = chosen.reliability(rois, torch.zeros(2, 4), [], other_half(part))
        swapped = chosen.teacher.features(weak.images.flip(0))
        expected = chosen.teacher.box_head(swapped, boxes)[0].softmax(-1)[:, -1]
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("share", [0, 1])
def test_a_step(share):
    low = [f"method.{key}_threshold=0" for key in ("pool", "rpn", "cls")]
    chosen = method(f"method.mixup={share}", "detector.score_threshold=0", "method.reg_variance_threshold=9", *low)
    plain = replace(noise_views(), boxes=[], labels=[])
    losses, facts = chosen.losses(Batch(noise_views(seed=1), plain, plain))
    assert facts["pseudo_boxes_pool"] == 100  # of an image, whether it lies under another or not
    assert all(torch.isfinite(v) for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@pytest.mark.parametrize("name", ["fasterrcnn_tiny_fpn", "fcos_tiny_fpn"])
@pytest.mark.parametrize("kind", ["student_background", "iou", "reverse_iou", "teacher_background"])
def test_a_weight_that_does_not_ask_the_teacher_counts_once(monkeypatch, name, kind):
    low = [f"method.{key}_threshold=0" for key in ("pool", "rpn", "cls")]
    chosen = method("method.mixup=1", f"method.reliability={kind}", "detector.score_threshold=0", *low, name=name)
    asked = []
    monkeypatch.setattr(chosen, "reliability", lambda *x, real=chosen.reliability: asked.append(x) or real(*x))
    plain = replace(noise_views(), boxes=[], labels=[])
    chosen.losses(Batch(noise_views(seed=1), plain, plain))
    assert len(asked) == (2 if kind == "teacher_background" else 1)


def test_one_image_is_refused():
    settings = load_settings("demo", ["method.mixup=0.5", "training.unlabeled_per_batch=1"])
    student = build(settings.detector, 1)
    with pytest.raises(UserError, match="lays two images over each other"):
        build_method(settings, student, student, {"cat": 1.0})


def test_masks_are_refused():
    with pytest.raises(UserError, match="a mask can't be laid over another"):
        method("method.mixup=0.5", name="maskrcnn_tiny_fpn")
