"""Box jittering: what is drawn, and how far the teacher's refinement of it spreads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from softteacher.detections import Detections
from softteacher.detectors.boxes import HEAD_STD, encode
from softteacher.methods import soft_teacher as module
from softteacher.methods.base import Unlabeled
from tests.methods.test_soft_teacher import CLASSES, batch, believe, method
from tests.samples import noise_views


@pytest.mark.parametrize("law", ["normal", "uniform"])
@pytest.mark.parametrize("side", ["own_side", "mean_side"])
def test_the_form_of_the_jitter(monkeypatch, law, side):
    offsets, by = [], []
    jitter, variance = module.jitter, module.regression_variance
    monkeypatch.setattr(module, "jitter", lambda b, o, scale: offsets.append(o) or jitter(b, o, scale))
    monkeypatch.setattr(module, "regression_variance", lambda r, b: by.append(b) or variance(r, b))
    chosen = method(f"method.jitter_law={law}", f"method.variance_normalization={side}", "method.jitter_times=100")
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60]])
    believe(chosen, monkeypatch, [boxes, boxes], [0.95, 0.85], [0, 1])
    chosen.losses(batch())
    drawn = torch.cat([o.flatten() for o in offsets])
    assert drawn.std().item() == pytest.approx(1 if law == "normal" else 3**-0.5, rel=0.06)
    assert (drawn.abs().max() <= 1) == (law == "uniform")
    assert all((b is None) == (side == "own_side") for b in by)


def test_variance_is_small_where_the_refinement_does_not_care(monkeypatch):
    """Refinement that always answers the same box has no variance; none at all has about that of the jitter."""
    soft_teacher = method()
    box = torch.tensor([[10.0, 10, 50, 40]])
    found = [Detections(box, torch.tensor([0.9]), torch.tensor([1]))]
    features, sizes = soft_teacher.teacher.features(noise_views(1).images), torch.tensor([[64, 64]])

    def head(_, copies, exact):
        deltas = encode(box.expand_as(copies[0]), copies[0], HEAD_STD) if exact else torch.zeros_like(copies[0])
        return None, deltas[:, None].expand(-1, CLASSES, -1)

    monkeypatch.setattr(soft_teacher.teacher, "box_head", lambda f, c: head(f, c, True))
    noise = [torch.Generator()]
    assert soft_teacher.box_variance(features, found, sizes, noise)[0].item() == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(soft_teacher.teacher, "box_head", lambda f, c: head(f, c, False))
    values = [soft_teacher.box_variance(features, found, sizes, noise)[0].item() for _ in range(50)]
    assert np.mean(values) == pytest.approx(0.06, rel=0.2)  # method.jitter_scale


def test_variance_is_that_of_the_own_class(monkeypatch):
    """The head knows both objects, each by its own class only: a box of the right class is steady, another is not. It
    is cut at the border of the weak view, where the box was found, however small the strong view is."""
    soft_teacher, weak = method(), noise_views(1)
    objects = torch.tensor([[4.0, 4, 24, 24], [38, 38, 60, 60]])

    def head(features, copies):
        own = torch.cdist(copies[0], objects).argmin(1)
        deltas = torch.zeros(len(copies[0]), CLASSES, 4)
        deltas[torch.arange(len(own)), torch.tensor([2, 0])[own]] = encode(objects[own], copies[0], HEAD_STD)
        return None, deltas

    monkeypatch.setattr(soft_teacher.teacher, "box_head", head)
    shrunk = torch.diag(torch.tensor([0.5, 0.5, 1])).double()[None]
    strong = replace(weak, sizes=torch.tensor([[32, 32]]))
    for labels, steady in (([2, 0], [True, True]), ([2, 1], [True, False]), ([0, 0], [False, True])):
        found = [Detections(objects, torch.tensor([0.9, 0.9]), torch.tensor(labels))]
        pool = soft_teacher.pseudo_boxes(found, Unlabeled(weak, strong, shrunk, [], weak.noise()))[0]
        assert (pool.variance < 1e-4).tolist() == steady
        assert (pool.variance > 0.01).tolist() == [not s for s in steady]
