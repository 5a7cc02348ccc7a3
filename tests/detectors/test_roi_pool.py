"""Our RoIAlign against torchvision's: values and gradients."""

import pytest
import torch
from torchvision.ops import roi_align

from softteacher.detectors.boxes import pyramid_level
from softteacher.detectors.roi_pool import roi_pool

STRIDES = [4, 8, 16, 32]
SIDE = 256


def torchvisions(features, rois, ratio, side=7):
    level = pyramid_level(rois[:, 1:], 4)
    pooled = torch.empty(len(rois), features[0].shape[1], side, side)
    for n, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        pooled[level == n] = roi_align(feature.float(), rois[level == n], side, 1 / stride, ratio, aligned=True)
    return pooled.permute(0, 2, 3, 1).flatten(1)


def boxes(kind, generator):
    centre, size = torch.rand(40, 2, generator=generator) * SIDE, torch.rand(40, 2, generator=generator)
    size = {"any": size * SIDE, "tiny": size * 2, "huge": size * 3 * SIDE, "thin": size * torch.tensor([SIDE, 3])}[kind]
    return torch.cat([centre - size / 2, centre + size / 2], 1)


@pytest.mark.parametrize("kind", ["any", "tiny", "huge", "thin"])
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize(("threads", "side"), [(1, 7), (3, 7), (3, 14)])
def test_it_is_torchvisions(kind, ratio, threads, side):
    generator = torch.Generator().manual_seed(0)
    both = []
    for channels_last in (True, False):
        maps = [torch.randn(2, 5, SIDE // s, SIDE // s, generator=generator.manual_seed(s)) for s in STRIDES]
        if channels_last:
            maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        both.append([m.requires_grad_() for m in maps])
    found = boxes(kind, generator.manual_seed(1))
    found[:3] = torch.tensor([[0.0, 0, 0, 0], [-40, -40, SIDE + 40, SIDE + 40], [SIDE, SIDE, SIDE + 9, SIDE + 9]])
    rois = torch.cat([torch.arange(40)[:, None] % 2, found], 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = roi_pool(both[0], STRIDES, rois, ratio, side), torchvisions(both[1], rois, ratio, side)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        gradient = torch.randn(ours.shape, generator=generator)
        ours.backward(gradient)
    finally:
        torch.set_num_threads(before)
    theirs.backward(gradient)
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_no_rois():
    maps = [torch.randn(1, 4, SIDE // s, SIDE // s, requires_grad=True) for s in STRIDES]
    pooled = roi_pool(maps, STRIDES, torch.zeros(0, 5), 0)
    assert pooled.shape == (0, 49 * 4)
    pooled.sum().backward()
    assert maps[0].grad.abs().sum() == 0


def test_bf16_maps_give_bf16_bins_and_gradients():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 6, SIDE // s, SIDE // s, generator=generator).bfloat16().float() for s in STRIDES]
    rois = torch.cat([torch.arange(40)[:, None] % 2, boxes("any", generator)], 1)
    gradient = torch.randn(40, 49 * 6, generator=generator).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        maps = [m.to(dtype, copy=True).requires_grad_() for m in exact]
        pooled = roi_pool(maps, STRIDES, rois, 0)
        pooled.backward(gradient.to(dtype))
        results.append([pooled.detach(), *(m.grad for m in maps)])
    for full, half in zip(*results, strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("value", [1.0, 1.00390625, 1.01171875, -3.3e38, 0.0, float("inf"), float("nan")])
def test_bf16_bins_are_rounded_as_torch_rounds(value):
    maps = [torch.full((1, 1, SIDE // s, SIDE // s), value) for s in STRIDES]
    rois = torch.tensor([[0.0, 30, 30, 90, 90]])
    full, half = (roi_pool([m.to(dtype) for m in maps], STRIDES, rois, 1) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(half, full.bfloat16(), rtol=0.01, atol=0, equal_nan=True)


def test_the_result_does_not_depend_on_the_number_of_threads():
    maps = [torch.randn(1, 6, SIDE // s, SIDE // s) for s in STRIDES]
    rois = torch.cat([torch.zeros(40, 1), boxes("any", torch.Generator().manual_seed(2))], 1)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        own = [m.clone().requires_grad_() for m in maps]
        pooled = roi_pool(own, STRIDES, rois, 0)
        pooled.square().sum().backward()
        found.append((pooled.detach(), own[0].grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
