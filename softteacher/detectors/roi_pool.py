"""RoIAlign over the levels of a feature pyramid.

On a processor it is our own kernel: torchvision's reads maps channel by channel, and its backward runs on one core
without vector instructions, a third of a training step. Ours walks along the channels of channels_last maps. Each core
has channels of its own, so no two write to the same place and the result is the same on any number of cores.
On GPUs, and in the exported graph, it is torchvision's operator.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.extending import overload
from torch import Tensor
from torchvision.ops import roi_align

from softteacher.detectors.boxes import pyramid_level

POOL = 7


def roi_pool(features: list[Tensor], strides: list[int], rois: Tensor, sampling_ratio: int, side: int = POOL) -> Tensor:
    """Pool each RoI to side x side bins on its own pyramid level (aligned RoIAlign, Mask R-CNN; FPN paper, Eq. 1).

    Args:
        features: L maps [B, C, H, W], float32 or bfloat16, gradients flow to them.
        strides: pixels of a cell in each.
        rois: [R, 5] float32: image index, then xyxy in pixels. No gradient flows to them.
        sampling_ratio: points per bin and axis; 0: as many as the bin has cells, rounded up.
        side: bins on each axis.

    Returns:
        [R, side * side * C] of the maps' type: the bins row by row, the channels of each bin together.
    """
    level, dtype = pyramid_level(rois[:, 1:], len(features)), features[0].dtype
    if torch.compiler.is_exporting():
        return _in_one_call(features, strides, rois, level, sampling_ratio, side)
    if not rois.is_cpu:
        pooled = rois.new_zeros((rois.shape[0], features[0].shape[1], side, side))
        for n, (feature, stride) in enumerate(zip(features, strides, strict=True)):
            here = torch.nonzero(level == n).flatten()
            part = roi_align(feature.float(), rois[here], side, 1 / stride, sampling_ratio, aligned=True)
            pooled = pooled.index_copy(0, here, part)
        return pooled.permute(0, 2, 3, 1).flatten(1).to(dtype)
    if dtype not in {torch.float32, torch.bfloat16}:
        features = [f.float() for f in features]
    return _RoIPool.apply(rois.detach(), level, strides, sampling_ratio, side, *features).to(dtype)


def _in_one_call(
    features: list[Tensor], strides: list[int], rois: Tensor, level: Tensor, sampling_ratio: int, side: int
) -> Tensor:
    """For the exported graph, whose shapes then don't depend on which RoI goes where: the maps under each other in one.

    Points outside a map take the value at its edge; a border that repeats the edge gives the same.
    """
    width, rows, tops = features[0].shape[-1] + 2, [], [1]
    for feature in features:
        bordered = F.pad(feature, (1, 1, 1, 1), mode="replicate")
        rows.append(F.pad(bordered, (0, width - bordered.shape[-1])))
        tops.append(tops[-1] + bordered.shape[-2])
    scale, top = (rois.new_tensor(values)[level, None] for values in ([1 / s for s in strides], tops[:-1]))
    moved = rois[:, 1:] * scale + torch.cat([torch.ones_like(top), top], 1).repeat(1, 2)
    atlas = torch.cat(rows, 2).float()
    pooled = roi_align(atlas, torch.cat([rois[:, :1], moved], 1), side, 1.0, sampling_ratio, aligned=True)
    return pooled.permute(0, 2, 3, 1).flatten(1)


class _RoIPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rois: Tensor, level: Tensor, strides: list[int], ratio: int, side: int, *features: Tensor
    ) -> Tensor:
        maps = [f.detach().permute(0, 2, 3, 1).contiguous() for f in features]
        scale = 1 / torch.tensor(strides, dtype=torch.float32)[level]
        places = (rois[:, 0].long().numpy(), level.numpy(), (rois[:, 1:] * scale[:, None] - 0.5).numpy())
        out = maps[0].new_empty((len(rois), side * side, maps[0].shape[-1]))
        _by_channels(*places, side, ratio, tuple(map(_array, maps)), False, _array(out))
        ctx.places, ctx.bins, ctx.shapes, ctx.dtype = places, (side, ratio), [m.shape for m in maps], features[0].dtype
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        maps = [torch.zeros(shape) for shape in ctx.shapes]
        grad = grads[0].unflatten(1, (ctx.bins[0] ** 2, -1)).contiguous()
        _by_channels(*ctx.places, *ctx.bins, tuple(map(_array, maps)), True, _array(grad))
        return (None, None, None, None, None, *(m.permute(0, 3, 1, 2).to(ctx.dtype) for m in maps))


def _array(x: Tensor) -> np.ndarray:
    """The same memory in numpy, which has no bfloat16: the bits of it."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _by_channels(*arguments: Any) -> None:
    """Run the kernel on shares of the channels, one a thread."""
    bounds = np.linspace(0, arguments[-1].shape[-1], torch.get_num_threads() + 1).astype(int).tolist()
    shares = list(itertools.pairwise(bounds))
    running = [_threads().submit(_pool, *arguments, *share) for share in shares[1:]]
    _pool(*arguments, *shares[0])
    for future in running:
        future.result()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="roi-pool")


def _jit(function: Callable[..., None]) -> Callable[..., None]:
    options: Any = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write the compiled code: a read-only file system without NUMBA_CACHE_DIR
        return numba.njit(**options)(function)


@numba.njit(nogil=True, inline="always")
def _bins(start, length, size, ratio, first, count, weight):  # type: ignore[no-untyped-def]
    """Bilinear weights of the cells under each bin of an axis: bin i has `count[i]` cells from `first[i]` on."""
    points = ratio if ratio > 0 else math.ceil(length / len(count))
    for i in range(len(count)):
        first[i], count[i] = 0, 0
        for s in range(points):
            at = start + length / len(count) * (i + (s + 0.5) / points)
            if at < -1 or at > size:
                continue
            at = min(max(at, 0.0), size - 1.0)
            low = int(at)
            if count[i] == 0:
                first[i] = low
            k = low - first[i]
            while count[i] < min(k + 2, size - first[i]):
                weight[i, count[i]] = 0
                count[i] += 1
            weight[i, k] += (low + 1 - at) / points
            if at > low:
                weight[i, k + 1] += (at - low) / points


def _float32(x): ...  # type: ignore[no-untyped-def]


def _store(value, out, index): ...  # type: ignore[no-untyped-def]


@overload(_float32)
def _of_bits(x):  # type: ignore[no-untyped-def]
    """A float32, or the bits of a bfloat16 (they are the upper half of a float32's)."""
    if x == numba.types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(_store)
def _as_bits(value, out, index):  # type: ignore[no-untyped-def]
    """The same the other way, rounded to the nearest, of two to the even one."""

    def as_it_is(value, out, index):  # type: ignore[no-untyped-def]
        out[index] = value

    def as_bits(value, out, index):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        out[index] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return as_bits if out.dtype == numba.types.uint16 else as_it_is


@_jit
def _pool(image, level, boxes, side, ratio, maps, back, bins, low, high):  # type: ignore[no-untyped-def]
    """Fill `bins` [R, side * side, C] from the maps, or if `back` add its gradients to these; channels low to high."""
    most = 2 + max([max(m.shape[1], m.shape[2]) for m in maps])
    y0, ny, wy = np.empty(side, np.int64), np.empty(side, np.int64), np.empty((side, most), np.float32)
    x0, nx, wx = np.empty(side, np.int64), np.empty(side, np.int64), np.empty((side, most), np.float32)
    row = np.empty(bins.shape[-1], np.float32)
    for r in range(len(boxes)):
        feature = maps[level[r]][image[r]]
        _bins(boxes[r, 1], boxes[r, 3] - boxes[r, 1], feature.shape[0], ratio, y0, ny, wy)
        _bins(boxes[r, 0], boxes[r, 2] - boxes[r, 0], feature.shape[1], ratio, x0, nx, wx)
        for i in range(side):
            for j in range(side):
                here = bins[r, i * side + j]
                for c in range(low, high):
                    row[c] = 0
                for k in range(ny[i]):
                    for m in range(nx[j]):
                        weight, cell = wy[i, k] * wx[j, m], feature[y0[i] + k, x0[j] + m]
                        if back:
                            for c in range(low, high):
                                cell[c] += weight * _float32(here[c])
                        else:
                            for c in range(low, high):
                                row[c] += weight * _float32(cell[c])
                if not back:
                    for c in range(low, high):
                        _store(row[c], here, c)
