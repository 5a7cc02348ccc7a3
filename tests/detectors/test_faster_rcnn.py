"""The detector: shapes, order, and that an image's answer is its own whatever else is in the batch."""

import pytest
import torch
from torchvision.ops import box_iou, roi_align

from softteacher.config import load_settings
from softteacher.detectors.boxes import HEAD_STD, clip, decode
from softteacher.detectors.build import build
from tests.samples import TINY

SETTINGS = load_settings("demo", [*TINY, "detector.max_detections=20"]).detector


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    detector = build(SETTINGS, 3).eval()
    torch.nn.init.normal_(detector.head_logits.weight, std=0.5)  # opinions, as training would give it
    torch.nn.init.normal_(detector.head_deltas.weight, std=0.05)
    torch.nn.init.normal_(detector.rpn_logits.weight, std=0.5)
    return detector


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


SIZES = torch.tensor([[96, 64], [80, 60], [33, 64]])


def test_pyramid(detector, images):
    shapes = [tuple(f.shape) for f in detector.features(images)]
    assert shapes == [(3, 16, 24, 16), (3, 16, 12, 8), (3, 16, 6, 4), (3, 16, 3, 2), (3, 16, 2, 1)]


@torch.inference_mode()
def test_a_pyramid_from_stride_8(images):
    """Anchors and pooling of `detector.finest_stride=8`: cells are 8 pixels where they were 4; boxes of less than 112
    pixels are pooled from the finest level."""
    coarse = build(SETTINGS.model_copy(update={"finest_stride": 8}), 3).eval()
    features = coarse.features(images)
    assert [tuple(f.shape[2:]) for f in features] == [(12, 8), (6, 4), (3, 2), (2, 1)]
    anchors = coarse.rpn(features).anchors
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[3].tolist() == [8, 0]  # the second cell of the first row
    assert (anchors[1, 2:] - anchors[1, :2]).tolist() == [32, 32]  # detector.anchor_scale=4
    boxes = torch.tensor([[4.0, 8, 40, 60], [-20, -30, 100, 90], [-99, -99, 199, 199]])
    pooled = coarse.pool(features, [boxes[:0], boxes, boxes[:0]], 7)
    for box, found, level in zip(boxes, pooled, range(3), strict=True):
        roi = torch.cat([torch.ones(1), box])[None]
        own = roi_align(features[level], roi, 7, 1 / (8 * 2**level), SETTINGS.sampling_ratio, aligned=True)
        torch.testing.assert_close(found, own[0].permute(1, 2, 0).flatten(), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("training", [False, True])
def test_proposals(detector, images, training):
    rpn = detector.rpn(detector.features(images))
    assert rpn.logits.shape == (3, len(rpn.anchors))
    assert sum(rpn.per_level) == len(rpn.anchors)
    boxes, scores = detector.proposals(rpn, SIZES, training)
    assert boxes.shape == (3, 100, 4)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert (scores > 0).any(1).all()
    for box, score, (height, width) in zip(boxes, scores, SIZES.tolist(), strict=True):
        used = box[score > 0]
        assert (used >= 0).all()
        assert (used[:, [0, 2]] <= width).all()
        assert (used[:, [1, 3]] <= height).all()
        assert (used[:, 2:] > used[:, :2]).all()


@torch.inference_mode()
def test_detections(detector, images):
    boxes, scores, labels = detector.detect(detector.features(images), SIZES)
    assert (boxes.shape, scores.shape, labels.shape) == ((3, 20, 4), (3, 20), (3, 20))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert ((scores == 0) | (scores > 0.05)).all()
    assert labels.min() >= 0
    assert labels.max() <= 2
    found = detector(images, SIZES)
    assert [len(d) for d in found] == (scores > 0).sum(1).tolist()
    assert sum(len(d) for d in found) > 0


@torch.inference_mode()
def test_refined_boxes_are_where_the_box_head_moves_them(detector, images, monkeypatch):
    """Of each detection its own class's deltas count, at its own place; what it is, and how sure, stays."""
    features = detector.features(images)
    (boxes, scores, labels), pseudo = (detector.detect(features, SIZES, training) for training in (False, True))
    monkeypatch.setattr(detector, "settings", SETTINGS.model_copy(update={"refine_boxes": True}))
    refined, *same = detector.detect(features, SIZES)
    assert all(torch.equal(a, b) for a, b in zip(same, (scores, labels), strict=True))
    for n, size in enumerate(SIZES):
        _, deltas = detector.box_head([f[n : n + 1] for f in features], [boxes[n]])
        expected = clip(decode(deltas[torch.arange(20), labels[n]], boxes[n], HEAD_STD)[None], size[None])[0]
        used = scores[n] > 0
        torch.testing.assert_close(refined[n][used], expected[used], rtol=1e-4, atol=1e-3)
        assert (expected[used] - boxes[n][used]).abs().amax(1).median() > 0.1
    # the teacher's pseudo boxes stay as they were
    assert all(torch.equal(a, b) for a, b in zip(detector.detect(features, SIZES, True), pseudo, strict=True))


@torch.inference_mode()
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(detector, images):
    together = detector(images, SIZES)
    for n in range(3):
        alone = detector(images[n : n + 1], SIZES[n : n + 1])[0]
        torch.testing.assert_close(alone.boxes, together[n].boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.scores, together[n].scores, atol=1e-5, rtol=1e-4)
        assert alone.labels.tolist() == together[n].labels.tolist()


@torch.inference_mode()
def test_the_box_head_takes_lists_and_tensors(detector, images):
    features = detector.features(images)
    boxes = torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(0)) * 30
    boxes[..., 2:] += boxes[..., :2] + 1
    for a, b in zip(detector.box_head(features, boxes), detector.box_head(features, list(boxes)), strict=True):
        torch.testing.assert_close(a, b)
    logits, deltas = detector.box_head(features, [boxes[0], boxes[1][:0], boxes[2][:2]])
    assert (logits.shape, deltas.shape) == ((9, 4), (9, 3, 4))
    torch.testing.assert_close(logits[7:], detector.box_head(features, boxes)[0][14:16])


def test_overfitting_one_image_finds_its_object():
    """The parts fit together: a detector that is trained on one image finds what is in it."""
    from tests.samples import noise_views

    torch.manual_seed(0)
    detector = build(load_settings("demo", TINY).detector, 2)
    views = noise_views(1)
    views.labels[0] += 1
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    # towards nothing: at the full rate the box jumps from step to step
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=80)
    first = None
    for _ in range(80):
        loss = torch.stack(list(detector.losses(views).values())).sum()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 0.5 * first
    with torch.inference_mode():
        found = detector.eval()(views.images, views.sizes)[0]
    assert found.labels[0] == 1
    assert found.scores[0] > 0.5
    # found as COCO counts it: how near a few steps bring the box depends on the processor's rounding
    assert box_iou(found.boxes[:1], views.boxes[0]).item() > 0.5


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_rpn_at_some_anchors_is_the_rpn(channels_last):
    """Values, and the gradients of maps and weights, are those of the whole RPN read at these places."""
    torch.manual_seed(1)
    detector = build(load_settings("demo").detector, 3)
    for layer in (detector.rpn_logits, detector.rpn_deltas):
        torch.nn.init.normal_(layer.weight)
    sides = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    maps = [torch.randn(2, 48, *side) for side in sides]
    if channels_last:
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    count = 2 * 3 * sum(h * w for h, w in sides)
    index = torch.cat([torch.randint(count, (60,)), torch.tensor([0, count - 1, count // 2, 3 * 23, 7, 7])])
    found = []
    for sparse in (True, False):
        own = [m.clone().requires_grad_() for m in maps]
        detector.zero_grad()
        if sparse:
            logits, deltas = detector.rpn_at(own, index)
        else:
            rpn = detector.rpn(own)
            logits, deltas = rpn.logits.flatten()[index], rpn.deltas.flatten(0, 1)[index]
        (logits.sin().sum() + deltas.cos().sum()).backward()
        weights = [detector.rpn_conv.weight, detector.rpn_conv.bias, detector.rpn_logits.weight]
        found.append([logits, deltas, *(t.grad.clone() for t in [*own, *weights, detector.rpn_deltas.bias])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
