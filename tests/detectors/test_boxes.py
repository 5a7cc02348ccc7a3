"""Box arithmetic, against numbers worked out by hand and against torchvision."""

import math

import pytest
import torch
from torchvision.ops import batched_nms

from softteacher.detectors.boxes import HEAD_STD, RPN_STD, anchors, clip, decode, encode, nms_mask, pyramid_level


def random_boxes(count, side=100, seed=0):
    corner, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corner * side, corner * side + 1 + size * side / 3], 1)


def test_anchors():
    first, second = anchors([(2, 3), (1, 1)], [4, 8], 8.0, torch.device("cpu"))
    assert first.shape == (18, 4)
    assert second.shape == (3, 4)
    width, height = (first[:, 2:] - first[:, :2]).T
    torch.testing.assert_close(width * height, torch.full((18,), 32.0**2))
    torch.testing.assert_close((height / width)[:3], torch.tensor([0.5, 1, 2]))
    centre = (first[:, :2] + first[:, 2:]) / 2
    torch.testing.assert_close(centre[::3], torch.tensor([[0.0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]))
    assert second[1].tolist() == [-32, -32, 32, 32]


@pytest.mark.parametrize("std", [RPN_STD, HEAD_STD])
def test_decode_inverts_encode(std):
    boxes, reference = random_boxes(50), random_boxes(50, seed=1)
    torch.testing.assert_close(decode(encode(boxes, reference, std), reference, std), boxes)
    assert (encode(boxes, boxes, std) == 0).all()


def test_deltas_by_hand():
    delta = encode(torch.tensor([[10.0, 10, 30, 50]]), torch.tensor([[0.0, 0, 20, 20]]), HEAD_STD)
    torch.testing.assert_close(delta, torch.tensor([[5.0, 10.0, 0.0, math.log(2) / 0.2]]))
    wild = decode(torch.full((1, 4), 1e3), torch.tensor([[0.0, 0, 16, 16]]), RPN_STD)
    assert (wild[0, 2:] - wild[0, :2]).tolist() == pytest.approx([1000, 1000])  # sizes grow by 1000/16 at most


def test_clip():
    boxes = torch.tensor([[[-5.0, -5, 50, 50]], [[10, 10, 300, 20]]])
    assert clip(boxes, torch.tensor([[20, 30], [100, 200]])).tolist() == [[[0, 0, 30, 20]], [[10, 10, 200, 20]]]
    many = boxes[:, :, None].expand(2, 1, 3, 4)
    assert clip(many, torch.tensor([[20, 30], [100, 200]])).shape == (2, 1, 3, 4)


@pytest.mark.parametrize(
    ("side", "level"),
    [(0, 0), (1, 0), (56, 0), (111.9, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (5000, 3)],
)
def test_pyramid_level(side, level):
    assert pyramid_level(torch.tensor([[10.0, 10, 10 + side, 10 + side]]), 4).tolist() == [level]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_nms_is_torchvisions(groups, threshold):
    boxes = torch.stack([random_boxes(60, side=25, seed=1), random_boxes(60, side=25, seed=2)])
    scores = torch.rand(2, 60, generator=torch.Generator().manual_seed(3))
    scores[:, ::7] = 0
    label = torch.randint(0, groups, (2, 60), generator=torch.Generator().manual_seed(4))
    mask = nms_mask(boxes, scores, label, threshold)
    for n in range(2):
        real = torch.nonzero(scores[n] > 0).flatten()
        kept = real[batched_nms(boxes[n][real], scores[n][real], label[n][real], threshold)]
        assert torch.nonzero(mask[n]).flatten().tolist() == sorted(kept.tolist())
    assert 0 < mask.sum() < (scores > 0).sum()
