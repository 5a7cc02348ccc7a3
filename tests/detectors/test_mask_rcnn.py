"""The mask head: shapes, targets, and that the parts fit together."""

import pytest
import torch

from softteacher.config import load_settings
from softteacher.detections import paste_masks
from softteacher.detectors.build import build
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.detectors.mask_rcnn import MaskRCNN, mask_loss, mask_targets
from tests.samples import MASK_TINY, TINY, shape_views

SIZES = torch.tensor([[64, 64], [64, 64]])


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    detector = build(load_settings("demo", [*MASK_TINY, "detector.max_detections=20"]).detector, 3).eval()
    torch.nn.init.normal_(detector.head_logits.weight, std=0.5)  # opinions, as training would give it
    torch.nn.init.normal_(detector.mask_logits.weight, std=0.5)
    return detector


def test_the_name_decides():
    assert type(build(load_settings("demo", MASK_TINY).detector, 3)) is MaskRCNN
    assert type(build(load_settings("demo", TINY).detector, 3)) is FasterRCNN


@torch.inference_mode()
def test_a_box_has_the_mask_of_its_class(detector):
    """The head answers what a 1x1 convolution to all classes would, for lists and tensors of boxes."""
    features = detector.features(shape_views().images)
    boxes = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 30
    boxes[..., 2:] += boxes[..., :2] + 1
    labels = torch.arange(10) % 3
    masks = detector.mask_head(features, boxes, labels)
    assert masks.shape == (10, 28, 28)
    torch.testing.assert_close(detector.mask_head(features, list(boxes), labels), masks)
    pooled = detector.pool(features, boxes, 14).unflatten(1, (14, 14, -1)).permute(0, 3, 1, 2)
    every = detector.mask_logits(detector.mask_convs(pooled))
    torch.testing.assert_close(every[torch.arange(10), labels], masks, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_detections_have_masks(detector):
    views = shape_views()
    found = detector(views.images, SIZES)
    assert sum(map(len, found)) > 0
    assert all(d.masks.shape == (len(d), 28, 28) for d in found)
    assert all(((d.masks >= 0) & (d.masks <= 1)).all() for d in found)
    alone = detector(views.images[1:], SIZES[1:])[0]
    torch.testing.assert_close(alone.masks, found[1].masks, atol=1e-4, rtol=1e-3)
    from_features = detector.detections(detector.features(views.images), SIZES)
    assert all((a.masks == b.masks).all() for a, b in zip(from_features, found, strict=True))


def square(side=64):
    masks = torch.zeros(2, side, side, dtype=torch.bool)
    masks[0, 8:36, 16:44] = True
    masks[1, 40:, :] = True
    return masks


@pytest.mark.parametrize(
    ("box", "matched", "expected"),
    [
        ([16, 8, 44, 36], 0, (slice(None), slice(None))),
        ([2, 8, 30, 36], 0, (slice(None), slice(14, None))),  # half a box to the left
        ([16, 22, 44, 50], 0, (slice(0, 14), slice(None))),
        ([16, 22, 44, 50], 1, (slice(18, None), slice(None))),
        ([2, 0, 58, 44], 0, (slice(5, 23), slice(7, 21))),  # cells of two pixels
        ([50, 0, 64, 8], 0, (slice(0), slice(0))),
    ],
)
def test_targets_are_what_lies_in_the_roi(box, matched, expected):
    truth = torch.zeros(28, 28, dtype=torch.bool)
    truth[expected] = True
    found = mask_targets(square(), torch.tensor([box]).float(), torch.tensor([matched]))
    assert found.shape == (1, 28, 28)
    assert (found[0] == truth).all()


@pytest.mark.parametrize("objects", [0, 2])
def test_no_positive(objects):
    nothing = mask_targets(square()[:objects], torch.zeros(0, 4), torch.zeros(0).long())
    assert nothing.shape == (0, 28, 28)
    assert mask_loss(torch.zeros(0, 28, 28), nothing) == 0


def test_loss_is_the_mean_over_pixels_and_rois():
    logits, targets = torch.tensor([2.0, -2.0])[:, None, None].expand(2, 28, 28), torch.ones(2, 28, 28).bool()
    expected = torch.nn.functional.softplus(torch.tensor([-2.0, 2.0])).mean()
    torch.testing.assert_close(mask_loss(logits, targets), expected)


def test_images_without_objects_teach_no_mask(detector):
    views = shape_views()
    views.boxes, views.labels = [torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2
    views.masks = [torch.zeros(0, 64, 64).bool()] * 2
    losses = detector.losses(views)
    assert losses["mask"] == 0
    detector.zero_grad()
    losses["mask"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in detector.mask_convs.parameters())


def test_views_without_masks_have_no_mask_loss(detector):
    views = shape_views()
    assert set(detector.losses(views)) == {"rpn_cls", "rpn_box", "cls", "box", "mask"}
    views.masks = None
    assert set(detector.losses(views)) == {"rpn_cls", "rpn_box", "cls", "box"}


def test_overfitting_two_images_draws_their_objects():
    torch.manual_seed(0)
    detector, views = build(load_settings("demo", MASK_TINY).detector, 1), shape_views()
    views.labels = [torch.tensor([0])] * 2
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(40):
        loss = torch.stack(list(detector.losses(views).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        found = detector.eval()(views.images, views.sizes)
    for d, truth in zip(found, views.masks, strict=True):
        assert d.scores[0] > 0.5
        pasted = torch.from_numpy(paste_masks(d[:1], 64, 64))
        assert (pasted & truth).sum() / (pasted | truth).sum() > 0.7


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision(precision):
    torch.manual_seed(0)
    detector, views, values = build(load_settings("demo", MASK_TINY).detector, 2), shape_views(), []
    for chosen in (torch.float32, precision):
        detector.precision = chosen
        loss = detector.losses(views)["mask"]
        assert loss.dtype == torch.float32
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.01)
