"""What the log says of the teacher."""

import math

import pytest
import torch

from softteacher.detections import Detections
from softteacher.methods.diagnostics import pseudo_box_quality, score_histogram

A, B, FAR = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [60.0, 60, 70, 70]


def found(boxes, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.ones(len(boxes)), torch.tensor(labels).long())


@pytest.mark.parametrize(
    ("pseudo", "truth", "precision", "recall"),
    [
        (found([A, B], [0, 1]), ([A, B], [0, 1]), 1, 1),
        (found([A, B], [1, 1]), ([A, B], [0, 1]), 0.5, 0.5),  # another class
        (found([A, A], [0, 0]), ([A], [0]), 0.5, 1),  # each object counts once
        (found([A, FAR], [0, 0]), ([A, B, B], [0, 0, 0]), 0.5, 1 / 3),
        (found([], []), ([A], [0]), math.nan, 0),
        (found([A], [0]), ([], []), math.nan, math.nan),  # nothing is known of it
        (found([[0.0, 0, 10, 4]], [0]), ([A], [0]), 0, 0),  # IoU .4
    ],
)
def test_precision_and_recall(pseudo, truth, precision, recall):
    boxes, labels = torch.tensor(truth[0]).reshape(-1, 4), torch.tensor(truth[1]).long()
    quality = pseudo_box_quality([pseudo], [boxes], [labels])
    assert quality == pytest.approx({"pseudo_precision": precision, "pseudo_recall": recall}, nan_ok=True)


def test_over_all_images():
    boxes = [torch.tensor([A]), torch.tensor([A, B]), torch.zeros(0, 4)]
    labels = [torch.zeros(len(b)).long() for b in boxes]
    quality = pseudo_box_quality([found([A], [0]), found([FAR], [0]), found([A], [0])], boxes, labels)
    assert quality == pytest.approx({"pseudo_precision": 1 / 2, "pseudo_recall": 1 / 3})


def test_histogram():
    scores = torch.tensor([[0.95, 0.91, 0.35, 0.0], [1.0, 0.0, 0.0, 0.0]])
    histogram = score_histogram(scores)
    assert {k: v for k, v in histogram.items() if v} == {"teacher_scores/0.9": 1.5, "teacher_scores/0.3": 0.5}
    assert len(histogram) == 10
