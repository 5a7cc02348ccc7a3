"""Detections and their masks: what is kept, and where a mask comes to lie."""

import numpy as np
import pytest
import torch

from softteacher.detections import Detections, match_boxes, paste_masks


def found(masks):
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 3]])
    return Detections(boxes, torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), masks)


@pytest.mark.parametrize("keep", [torch.tensor([False, True]), torch.tensor([1]), slice(1, 2)])
def test_masks_are_kept_with_their_boxes(keep):
    masks = torch.rand(2, 28, 28)
    assert torch.equal(found(masks)[keep].masks, masks[1:])
    assert found(None)[keep].masks is None


def test_numpy():
    masks = torch.rand(2, 28, 28, requires_grad=True)
    as_numpy = found(masks).numpy()
    assert as_numpy.masks.dtype == np.float16
    np.testing.assert_allclose(as_numpy.masks, masks.detach(), atol=1e-3)
    assert found(None).numpy().masks is None


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([2, 1, 6, 3], (slice(1, 3), slice(2, 6))),
        ([2.4, 0.6, 6.4, 3.4], (slice(1, 3), slice(2, 6))),  # pixels whose centres lie in it
        ([-5, -5, 50, 50], (slice(0, 20), slice(0, 30))),
        ([25, 15, 300, 200], (slice(15, 20), slice(25, 30))),
        ([40, 2, 50, 8], (slice(0), slice(0))),
        ([-9, -9, -2, -2], (slice(0), slice(0))),
        ([7, 7, 7, 7], (slice(0), slice(0))),
    ],
)
def test_a_full_mask_fills_its_box(box, expected):
    detections = Detections(np.array([box], np.float32), np.ones(1), np.zeros(1, int), np.ones((1, 28, 28), np.float16))
    truth = np.zeros((20, 30), bool)
    truth[expected] = True
    pasted = paste_masks(detections, 20, 30)
    assert pasted.dtype == bool
    assert (pasted[0] == truth).all()


def test_pasting_is_bilinear():
    """As torch interpolates, at every pixel of the box; several boxes at once."""
    masks = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0, 60, 45], [10, 5, 38, 33], [3, 8, 17, 22]])
    pasted = paste_masks(Detections(boxes, torch.ones(3), torch.zeros(3).long(), masks), 50, 60)
    for mask, box, ours in zip(masks, boxes.int().tolist(), pasted, strict=True):
        x1, y1, x2, y2 = box
        size = (y2 - y1, x2 - x1)
        expected = torch.nn.functional.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        clear = (expected - 0.5).abs() > 1e-3  # half precision
        assert (ours[y1:y2, x1:x2][clear] == (expected >= 0.5).numpy()[clear]).all()
        assert ours.sum() == ours[y1:y2, x1:x2].sum()


def test_no_detections():
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), np.zeros((0, 28, 28)))
    assert paste_masks(none, 4, 6).shape == (0, 4, 6)


def test_the_same_objects_of_two_detectors():
    a = Detections(
        np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [21, 0, 31, 10], [0, 0, 10, 10], [50, 50, 60, 60]]),
        np.array([0.5, 0.6, 0.9, 0.7, 0.8]),
        np.array([0, 0, 0, 1, 0]),
    )
    b = Detections(np.array([[20.0, 0, 30, 10], [0, 0, 9, 10]]), np.array([0.3, 0.4]), np.array([0, 0]))
    # the third takes the box that the second overlaps more; the fourth is of another class, the last is alone
    assert match_boxes(a, b, 0.5) == [(2, 0), (0, 1)]
    assert match_boxes(a, b, 0.85) == [(1, 0), (0, 1)]
    assert match_boxes(a, b, 0.95) == [(1, 0)]
    none = b[np.zeros(2, bool)]
    assert match_boxes(a, none, 0.5) == match_boxes(none, a, 0.5) == []
