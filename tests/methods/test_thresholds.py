"""Adaptive thresholds: the score above which there are as many boxes of a class as labels promise."""

import pytest
import torch

from softteacher.config import load_settings
from softteacher.detections import Detections
from softteacher.methods.thresholds import FEWEST, WINDOW, ClassThresholds


def thresholds(*overrides, frequency=(1.0, 0.5, 0.0)):
    settings = load_settings(None, ["method.threshold=adaptive", *overrides]).method
    return ClassThresholds(settings, torch.tensor(frequency))


def detections(scores, labels):
    return Detections(torch.zeros(len(scores), 4), torch.tensor(scores), torch.tensor(labels))


def feed(chosen, images, seed=0):
    """Images with two boxes of class 0, one of class 1, and an unused place; returns all scores and labels."""
    scores = torch.rand(images, 4, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    scores[:, 3] = 0
    labels = torch.tensor([0, 1, 0, 0]).expand(images, -1)
    for n in range(0, images, 4):
        chosen.observe(scores[n : n + 4], labels[n : n + 4])
    return scores, labels


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_as_many_boxes_as_labels_promise(share):
    chosen = thresholds(f"method.adaptive_share={share}")
    scores, labels = feed(chosen, 64)
    for label, frequency in ((0, 1.0), (1, 0.5)):
        mine = scores[(labels == label) & (scores > 0)]
        above = chosen.above(detections(mine.tolist(), [label] * len(mine)), 0.9)
        assert above.sum() == pytest.approx(share * frequency * 64, abs=1)
        assert mine[above].min() > mine[~above].max() if (~above).any() else True


def test_a_class_without_labels_is_never_taught():
    chosen = thresholds()
    chosen.observe(torch.full((FEWEST, 2), 0.99), torch.full((FEWEST, 2), 2))
    assert not chosen.above(detections([0.99], [2]), 0.5).any()


def test_fewer_boxes_than_promised_all_teach():
    chosen = thresholds(frequency=(3.0, 3.0, 3.0))
    feed(chosen, 64)
    assert chosen.above(detections([0.1, 0.11], [0, 1]), 0.9).all()


def test_fixed_before_there_is_enough_to_see_and_where_it_is_chosen():
    boxes = detections([0.95, 0.9, 0.5], [0, 1, 0])
    young = thresholds()
    feed(young, FEWEST - 4)
    fixed = thresholds("method.threshold=fixed")
    feed(fixed, 64)
    for chosen in (young, fixed):
        assert chosen.above(boxes, 0.9).tolist() == [True, False, False]  # strictly above
        assert chosen.facts() == {}


def test_old_images_are_forgotten():
    chosen = thresholds()
    feed(chosen, 40)
    chosen.observe(torch.full((WINDOW, 1), 0.3), torch.zeros(WINDOW, 1, dtype=torch.int64))
    assert chosen.values[0] == 0  # one box an image, as promised: all of them


def test_state():
    chosen, resumed = thresholds(), thresholds()
    feed(chosen, 48)
    resumed.load_state(chosen.state())
    assert torch.equal(resumed.values, chosen.values)
    feed(chosen, 16, seed=1)
    feed(resumed, 16, seed=1)
    assert torch.equal(resumed.values, chosen.values)
