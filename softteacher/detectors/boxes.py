"""Box arithmetic: anchors, deltas, pyramid levels, NMS. Boxes are xyxy in pixels, last dimension 4."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import nms

RPN_STD = (1.0, 1.0, 1.0, 1.0)
HEAD_STD = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_RATIO = abs(math.log(16 / 1000))
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width
FINEST = 56  # pixels; boxes from twice this side on go to the second level


def anchors(sizes: list[tuple[int, int]], strides: list[int], scale: float, device: torch.device) -> list[Tensor]:
    """The anchors of each pyramid level.

    Args:
        sizes: (height, width) of each level's feature map.
        strides: pixels between two cells of each level.
        scale: anchor side over stride.
        device: where to put them.

    Returns:
        A tensor [height * width * 3, 4] per level, cell by cell in row order; ratios .5, 1, 2 in each cell.
    """
    out = []
    ratio = torch.tensor(ASPECT_RATIOS, device=device).sqrt()
    for (height, width), stride in zip(sizes, strides, strict=True):
        half = scale * stride / 2
        base = torch.stack([-half / ratio, -half * ratio, half / ratio, half * ratio], 1)
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        shift = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        out.append((shift + base).reshape(-1, 4))
    return out


def encode(boxes: Tensor, reference: Tensor, std: tuple[float, ...]) -> Tensor:
    """Deltas (dx, dy, dw, dh) [N, 4] that turn reference boxes [N, 4] into boxes [N, 4], divided by `std`."""
    size, reference_size = boxes[..., 2:] - boxes[..., :2], reference[..., 2:] - reference[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    reference_centre = (reference[..., :2] + reference[..., 2:]) / 2
    deltas = torch.cat([(centre - reference_centre) / reference_size, (size / reference_size).log()], -1)
    return deltas / deltas.new_tensor(std)


def decode(deltas: Tensor, reference: Tensor, std: tuple[float, ...]) -> Tensor:
    """Boxes [..., 4] from deltas [..., 4] and reference boxes [..., 4]; not clipped."""
    deltas = deltas * deltas.new_tensor(std)
    reference_size = reference[..., 2:] - reference[..., :2]
    centre = (reference[..., :2] + reference[..., 2:]) / 2 + deltas[..., :2] * reference_size
    half = reference_size * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [B, ..., 4] to images of `sizes` [B, 2] (height, width)."""
    limit = sizes.flip(-1).to(boxes.dtype).repeat(1, 2).reshape(sizes.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limit)


def pyramid_level(boxes: Tensor, levels: int) -> Tensor:
    """The pyramid level [N], 0 to levels - 1, that each box [N, 4] is pooled on.

    Eq. 1 of the FPN paper for a pyramid that begins at stride 4. Levels count from the finest, as in mmdetection: one
    that begins at stride 8 (`detector.finest_stride`) pools every box a stride coarser than the paper would.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (area.clamp(min=0).sqrt() / FINEST + 1e-6).log2().floor().clamp(0, levels - 1).long()


def nms_mask(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Which boxes survive NMS among those of the same image and group.

    Args:
        boxes: [B, N, 4].
        scores: [B, N]; boxes with a score of 0 never survive.
        groups: [B, N] int64 from 0, level or class.
        threshold: IoU.

    Returns:
        [B, N] bool.
    """
    # groups are moved so far apart that boxes of two of them can't overlap
    span = boxes.max() + 1
    boxes = boxes + (groups.to(boxes.dtype) * span)[..., None]
    return nms_batch(boxes, scores, threshold) & (scores > 0)


# an operator of its own, because a loop over the images would fix their number in the exported graph
@torch.library.custom_op("softteacher::nms_batch", mutates_args=())
def nms_batch(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """NMS in each image by itself: boxes [B, N, 4], scores [B, N] to [B, N] bool, which survive."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for n, (b, s) in enumerate(zip(boxes, scores, strict=True)):
        mask[n, nms(b, s, threshold)] = True
    return mask


@nms_batch.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
