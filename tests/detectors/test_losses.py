"""Assignment, sampling and losses, worked out by hand."""

import math

import pytest
import torch

from softteacher.detectors.losses import (
    RoIs,
    RPNTargets,
    assign,
    classification_loss,
    regression_loss,
    rpn_loss,
    rpn_targets,
    sample,
    sample_rois,
)

# IoU with (0, 0, 10, 10): 1, .5, .25, 0
CANDIDATES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 5, 5], [50, 50, 60, 60]])
BOX = torch.tensor([[0.0, 0, 10, 10]])


@pytest.mark.parametrize(
    ("candidates", "boxes", "arguments", "expected"),
    [
        (CANDIDATES, BOX, (0.7, 0.3, False), [0, -2, -1, -1]),
        (CANDIDATES, BOX, (0.5, 0.5, False), [0, 0, -1, -1]),
        (CANDIDATES, BOX, (0.9, 0.2, False), [0, -2, -2, -1]),
        (CANDIDATES[1:], BOX, (0.7, 0.3, False), [-2, -1, -1]),
        (CANDIDATES[1:], BOX, (0.7, 0.3, True, 0.3), [0, -1, -1]),  # the best it can get
        (CANDIDATES[2:], BOX, (0.7, 0.3, True, 0.3), [-1, -1]),  # but not worse than .3
        (CANDIDATES, torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]), (0.7, 0.3, False), [1, -2, -1, 0]),
        (CANDIDATES, torch.zeros(0, 4), (0.7, 0.3, True, 0.3), [-1, -1, -1, -1]),
        (torch.zeros(0, 4), BOX, (0.7, 0.3, False), []),
    ],
)
def test_assign(candidates, boxes, arguments, expected):
    assert assign(candidates, boxes, *arguments).tolist() == expected


@pytest.mark.parametrize(
    ("positives", "negatives", "count", "share", "expected"),
    [
        (10, 1000, 256, 0.5, (10, 246)),
        (300, 1000, 256, 0.5, (128, 128)),
        (300, 5, 512, 0.25, (128, 5)),
        (0, 3, 8, 0.5, (0, 3)),
    ],
)
def test_sample(positives, negatives, count, share, expected):
    matched = torch.cat([torch.zeros(positives), torch.full((negatives,), -1), torch.full((50,), -2)]).long()
    matched = matched[torch.randperm(len(matched), generator=torch.Generator().manual_seed(0))]
    positive, negative = sample(matched, count, share, torch.Generator())
    assert (len(positive), len(negative)) == expected
    assert (matched[positive] == 0).all()
    assert (matched[negative] == -1).all()
    assert len(set(positive.tolist()) | set(negative.tolist())) == sum(expected)


def test_rpn_targets_leave_unsure_boxes_alone():
    """Neither positive nor negative where something may be; where a box is sure it stays positive."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    sizes, noise = torch.tensor([[64, 64]]), [torch.Generator()]
    box, unsure = [anchors[:1]], [anchors[:2] + 1]
    targets = rpn_targets(anchors, sizes, box, 8, noise, unsure)
    assert targets.anchors.tolist() == [0, 2]
    assert targets.objectness.tolist() == [1, 0]
    assert rpn_targets(anchors, sizes, box, 8, noise, [anchors[:0]]).anchors.tolist() == [0, 1, 2]


def test_rpn_targets_leave_the_padding_alone():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 11, 10], [40, 40, 50, 50], [20, 20, 30, 30]])
    targets = rpn_targets(
        anchors,
        torch.tensor([[32, 32], [64, 64]]),
        [BOX, torch.zeros(0, 4)],
        100,
        [torch.Generator(), torch.Generator()],
    )
    first, second = targets.anchors[targets.anchors < 4], targets.anchors[targets.anchors >= 4] - 4
    assert sorted(first.tolist()) == [0, 1, 3]  # the third is centred in the padding of the first image
    assert sorted(second.tolist()) == [0, 1, 2, 3]
    assert sorted(targets.anchors[targets.objectness > 0].tolist()) == [0, 1]
    assert targets.deltas.shape == (2, 4)


def test_rpn_loss():
    logits, deltas = torch.zeros(2), torch.full((2, 4), 0.5)
    targets = RPNTargets(torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), torch.zeros(1, 4))
    losses = rpn_loss(logits, deltas, targets)
    assert losses["rpn_cls"].item() == pytest.approx(math.log(2))
    assert losses["rpn_box"].item() == pytest.approx(0.5 * 4 / 2)
    nothing = rpn_loss(logits[:0], deltas[:0], RPNTargets(torch.zeros(0).long(), torch.zeros(0), torch.zeros(0, 4)))
    assert [v.item() for v in nothing.values()] == [0, 0]


def test_sample_rois_adds_the_ground_truth():
    proposals = torch.tensor([[[40.0, 40, 60, 60], [1, 1, 10, 10], [7, 7, 9, 9]]])
    valid = torch.tensor([[True, True, False]])
    rois = sample_rois(proposals, valid, [BOX], [torch.tensor([2])], 100, 5, [torch.Generator()])
    assert rois.boxes[0].tolist() == [[0, 0, 10, 10], [1, 1, 10, 10], [40, 40, 60, 60]]
    assert rois.labels.tolist() == [2, 2, 5]
    assert rois.targets.tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [40, 40, 60, 60]]
    none = sample_rois(proposals, valid, [torch.zeros(0, 4)], [torch.zeros(0).long()], 100, 5, [torch.Generator()])
    assert none.labels.tolist() == [5, 5]
    assert none.matched.tolist() == [-1, -1]


def test_sampled_rois_know_their_object():
    """Of two images, the first with two boxes: number, label and target of each RoI are those of the box it is on."""
    boxes = [torch.tensor([[0.0, 0, 10, 10], [30, 30, 50, 50]]), torch.tensor([[5.0, 5, 25, 25]])]
    near = torch.tensor([[[31.0, 30, 50, 50], [60, 0, 70, 10]], [[5, 6, 25, 25], [40, 40, 60, 60]]])
    labels = [torch.tensor([3, 1]), torch.tensor([2])]
    noise = [torch.Generator(), torch.Generator()]
    rois = sample_rois(near, torch.ones(2, 2, dtype=torch.bool), boxes, labels, 100, 5, noise)
    assert rois.matched.tolist() == [0, 1, 1, -1, 0, 0, -1]
    assert rois.labels.tolist() == [3, 1, 1, 5, 2, 2, 5]
    assert rois.targets[2].tolist() == [30, 30, 50, 50]
    assert rois.targets[5].tolist() == [5, 5, 25, 25]
    chosen = rois.select(rois.labels < 5)
    assert chosen.matched.tolist() == [0, 1, 1, 0, 0]
    assert [len(b) for b in chosen.boxes] == [3, 2]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, math.log(3)),
        ([1.0, 1.0, 0.5], math.log(3)),
        ([1.0, 0.0, 0.0], math.log(3)),
        ([0.2, 0.2, 0.1], 0.5 * math.log(3)),  # the sum of the weights counts as 1 at least
        ([0.0, 0.0, 0.0], 0.0),
    ],
)
def test_classification_loss(weights, expected):
    rois = RoIs(
        [torch.zeros(3, 4)], torch.tensor([0, 1, 2]), torch.zeros(3, 4), torch.tensor(3.0), torch.tensor([0, 0, 0])
    )
    loss = classification_loss(torch.zeros(3, 3), rois, weights and torch.tensor(weights))
    assert loss.item() == pytest.approx(expected)


def test_losses_of_nothing_are_finite_and_have_a_gradient():
    logits, deltas = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 2, 4, requires_grad=True)
    none = RoIs([torch.zeros(0, 4)], torch.zeros(0).long(), torch.zeros(0, 4), torch.tensor(1.0), torch.zeros(0).long())
    loss = classification_loss(logits, none) + regression_loss(deltas, none)
    loss.backward()
    assert loss.item() == 0


def test_regression_loss_is_of_the_own_class_over_all_rois():
    boxes, targets = (
        torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]),
        torch.tensor([[1.0, 0, 11, 10], [50, 50, 60, 60]]),
    )
    rois = RoIs([boxes], torch.tensor([1, 2]), targets, torch.tensor(2.0), torch.tensor([0, -1]))
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 0] = 99  # another class, and a negative: no matter
    deltas[1] = 99
    assert regression_loss(deltas, rois).item() == pytest.approx(1.0 / 2)  # a tenth of the width, std .1, two RoIs
    deltas[0, 1, 0] = 1
    assert regression_loss(deltas, rois).item() == pytest.approx(0, abs=1e-6)
