"""FCOS (arXiv 1904.01355) on a feature pyramid, in one class for training, evaluation and export.

With the improvements of its journal version that became common: centre sampling, GIoU loss, centerness beside the box
regression, distances in units of the stride. Everything that `detect` does is of fixed shape, see `faster_rcnn`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from softteacher import distributed
from softteacher.config import DetectorSettings
from softteacher.data.loader import Views
from softteacher.detectors.base import Detector
from softteacher.detectors.boxes import MAX_LOG_RATIO, clip, nms_mask
from softteacher.detectors.layers import MapConv

STRIDES = [8, 16, 32, 64, 128]
RADIUS = 1.5  # of the centre region, in strides
PRIOR = 0.01  # score of every class at a fresh detector's locations
CANDIDATES = 20  # scored boxes that enter the class-wise NMS, per detection that may leave it


class Dense(NamedTuple):
    """What is predicted at each of L locations, level by level in row order.

    Attributes:
        logits: [B, L, C].
        boxes: [B, L, 4], not clipped.
        centerness: [B, L] logits.
        locations: [L, 2] (x, y), centres of the cells in pixels.
        strides: [L].
        shapes: (height, width) of each level.
    """

    logits: Tensor
    boxes: Tensor
    centerness: Tensor
    locations: Tensor
    strides: Tensor
    shapes: list[tuple[int, int]]


class FCOS(Detector):
    """One-stage detector: each location on the pyramid P3 to P7 says which class and box it lies in.

    Args:
        backbone: four stages in a row, their outputs of strides 4, 8, 16, 32.
        channels: the channels of these outputs.
        classes: number of classes C; there is no background logit.
        settings: widths, thresholds; `finest_stride` is always 8.
    """

    class_heads = ("head_logits",)

    def __init__(self, backbone: nn.ModuleList, channels: list[int], classes: int, settings: DetectorSettings) -> None:
        settings = settings.model_copy(update={"finest_stride": STRIDES[0]})
        width = settings.fpn_channels
        super().__init__(backbone, channels, classes, settings, LastLevelP6P7(width, width))
        self.class_tower, self.box_tower = (_tower(width, settings.head_convs) for _ in range(2))
        self.head_logits = MapConv(nn.Conv2d(width, classes, 3, padding=1))
        self.head_boxes = MapConv(nn.Conv2d(width, 5, 3, padding=1))  # four distances and centerness
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for part in (self.class_tower, self.box_tower, self.head_logits, self.head_boxes):
            for module in part.modules():
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    nn.init.normal_(module.weight, std=0.01)
                    nn.init.constant_(module.bias, -math.log(1 / PRIOR - 1) if module is self.head_logits else 0.0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps [B, channels, H / stride, W / stride] of uint8 RGB images [B, 3, H, W].

        Those of the classification at strides 8 to 128, then those of the boxes: the towers of the head, half of the
        whole work, are behind them, so that whatever is asked of one image they run once.
        """
        pyramid = super().features(images)
        with self.autocast(images):
            return [tower(level) for tower in (self.class_tower, self.box_tower) for level in pyramid]

    def predict(self, features: list[Tensor]) -> Dense:
        """Classes, boxes and centerness at every location.

        Args:
            features: what `features` gave.
        """
        logits, distances, centerness, levels = [], [], [], []
        count = len(STRIDES)
        for n, (for_class, for_box) in enumerate(zip(features[:count], features[count:], strict=True)):
            with self.autocast(for_class):
                score, box = (
                    x.permute(0, 2, 3, 1).flatten(1, 2).float()
                    for x in (self.head_logits(for_class), self.head_boxes(for_box))
                )
            logits.append(score)
            distances.append((self.scales[n] * box[..., :4]).clamp(max=MAX_LOG_RATIO).exp() * STRIDES[n])
            centerness.append(box[..., 4])
            levels.append((int(for_class.shape[-2]), int(for_class.shape[-1])))
        locations, strides = grid(levels, features[0].device)
        left_top, right_bottom = torch.cat(distances, 1).split(2, -1)
        boxes = torch.cat([locations - left_top, locations + right_bottom], -1)
        return Dense(torch.cat(logits, 1), boxes, torch.cat(centerness, 1), locations, strides, levels)

    def detect(self, features: list[Tensor], sizes: Tensor, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """See `Detector`; scores are sqrt(class * centerness), and training makes no difference: no proposals."""
        dense = self.predict(features)
        scores = (dense.logits.sigmoid() * dense.centerness.sigmoid()[..., None]).sqrt()
        scores = scores * ((scores > self.settings.score_threshold) & inside(dense.locations, sizes)[..., None])
        wanted = self.settings.max_detections
        best, index = scores.flatten(1).topk(min(CANDIDATES * wanted, scores.shape[1] * self.classes), dim=1)
        labels, place = index % self.classes, index // self.classes
        boxes = clip(dense.boxes.gather(1, place[..., None].expand(-1, -1, 4)), sizes)
        kept = best * nms_mask(boxes, best, labels, self.settings.nms_threshold)
        best, order = kept.topk(min(wanted, kept.shape[1]), dim=1)
        return boxes.gather(1, order[..., None].expand(-1, -1, 4)), best, labels.gather(1, order)

    def losses(self, views: Views) -> dict[str, Tensor]:
        """Focal loss of the classes, GIoU loss of the boxes and cross-entropy of centerness, each of weight 1."""
        dense = self.predict(self.features(views.images))
        targets = dense_targets(dense.locations, dense.strides, views.sizes, views.boxes, views.labels, self.classes)
        return {"cls": focal_loss(dense.logits, targets)} | box_losses(dense, targets)


def grid(shapes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The locations [L, 2] (x, y) of levels of these (height, width), centres of their cells, and their strides [L]."""
    locations, strides = [], []
    for (height, width), stride in zip(shapes, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        locations.append((torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride)
        strides.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(locations), torch.cat(strides)


def inside(locations: Tensor, sizes: Tensor) -> Tensor:
    """Which locations [L, 2] lie in images of `sizes` [B, 2] (height, width), not in their padding: [B, L] bool."""
    return (locations < sizes.flip(-1)[:, None]).all(-1)


def assign_locations(locations: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Match locations to ground truth (FCOS, section 3).

    A location is positive for a box that it lies in, less than 1.5 strides from its centre along x and y, if the
    farthest side is as far away as its level is meant for: up to 64, 128, 256, 512 pixels or more at strides 8 to 128.
    Of several such boxes it takes the smallest.

    Args:
        locations: [L, 2] (x, y) pixels.
        strides: [L].
        boxes: [G, 4], possibly none.

    Returns:
        [L] int64: index of the matched box, -1 for negative.
    """
    if not len(boxes):
        return locations.new_full((len(locations),), -1, dtype=torch.int64)
    low = torch.where(strides > STRIDES[0], 4 * strides, 0.0)[:, None]
    high = torch.where(strides < STRIDES[-1], 8 * strides, math.inf)[:, None]
    distances = torch.cat([locations[:, None] - boxes[:, :2], boxes[:, 2:] - locations[:, None]], -1)
    off_centre = (locations[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(-1)
    farthest = distances.amax(-1)
    positive = (distances.amin(-1) > 0) & (off_centre < RADIUS * strides[:, None])
    positive &= (farthest >= low) & (farthest <= high)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    smallest, index = torch.where(positive, area, math.inf).min(1)
    return torch.where(smallest < math.inf, index, -1)


class DenseTargets(NamedTuple):
    """What the locations of a batch are taught.

    Attributes:
        labels: [B, L] int64; the background is class C.
        boxes: [P, 4] the boxes of the P positives, in the order of `labels`.
        used: [B, L] bool, false in the padding.
        positives: their number, see `softteacher.distributed.normalizer`.
    """

    labels: Tensor
    boxes: Tensor
    used: Tensor
    positives: Tensor


def dense_targets(
    locations: Tensor, strides: Tensor, sizes: Tensor, boxes: list[Tensor], labels: list[Tensor], classes: int
) -> DenseTargets:
    """Assign the locations of a batch.

    Args:
        locations: [L, 2].
        strides: [L].
        sizes: [B, 2] (height, width) of the images before padding.
        boxes: B x [n, 4] ground truth or pseudo boxes.
        labels: B x [n].
        classes: number of classes C.
    """
    used, own, matched_boxes = inside(locations, sizes), [], []
    for box, label, real in zip(boxes, labels, used, strict=True):
        matched = assign_locations(locations, strides, box)
        matched = torch.where(real, matched, -1)
        own.append(torch.cat([label, label.new_tensor([classes])])[matched])  # -1 is the last one
        matched_boxes.append(box[matched[matched >= 0]])
    targets = torch.cat(matched_boxes)
    return DenseTargets(torch.stack(own), targets, used, distributed.normalizer(len(targets), locations.device))


def focal_loss(logits: Tensor, targets: DenseTargets, weights: Tensor | None = None) -> Tensor:
    """Sigmoid focal loss of all classes, summed over the locations and divided by the number of positives.

    Args:
        logits: [B, L, C].
        targets: labels.
        weights: [B, L], 1 for positives, the reliability for negatives (Soft Teacher).
    """
    one_hot = F.one_hot(targets.labels, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    loss = sigmoid_focal_loss(logits, one_hot).sum(-1) * targets.used
    return (loss if weights is None else loss * weights).sum() / targets.positives


def box_losses(dense: Dense, targets: DenseTargets) -> dict[str, Tensor]:
    """GIoU loss and binary cross-entropy of centerness, summed over the positives and divided by their number."""
    positive = targets.labels < dense.logits.shape[-1]
    place = dense.locations.expand(len(positive), -1, -1)[positive]
    distances = torch.stack([place - targets.boxes[:, :2], targets.boxes[:, 2:] - place])  # [2, P, 2]
    centerness = (distances.amin(0) / distances.amax(0)).prod(-1).sqrt()
    cross_entropy = F.binary_cross_entropy_with_logits(dense.centerness[positive], centerness, reduction="sum")
    return {
        "box": generalized_box_iou_loss(dense.boxes[positive], targets.boxes, reduction="sum") / targets.positives,
        "centerness": cross_entropy / targets.positives,
    }


def _tower(width: int, convs: int) -> nn.Sequential:
    """3x3 convolutions with group norm: 32 groups at 256 channels, 8 channels in each at any width."""
    layers: list[nn.Module] = []
    for _ in range(convs):
        conv = MapConv(nn.Conv2d(width, width, 3, padding=1))
        layers += [conv, nn.GroupNorm(math.gcd(width, width // 8), width), nn.ReLU()]
    return nn.Sequential(*layers)
