"""Mask R-CNN (arXiv 1703.06870): Faster R-CNN with a head that draws the mask of each box."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from softteacher import distributed
from softteacher.config import DetectorSettings
from softteacher.data.loader import Views
from softteacher.detections import Detections
from softteacher.detectors.faster_rcnn import FasterRCNN

MASK_POOL = 14
MASK_SIDE = 28


class MaskRCNN(FasterRCNN):
    """Two-stage detector with masks.

    Args:
        backbone: four stages in a row, their outputs of strides 4, 8, 16, 32.
        channels: the channels of these outputs.
        classes: number of classes C; each has a mask of its own for a box, so that classes don't compete for pixels.
        settings: widths, numbers of proposals, thresholds.
    """

    class_heads = (*FasterRCNN.class_heads, "mask_logits")

    def __init__(self, backbone: nn.ModuleList, channels: list[int], classes: int, settings: DetectorSettings) -> None:
        super().__init__(backbone, channels, classes, settings)
        width, inputs = settings.mask_channels, [settings.fpn_channels, *[settings.mask_channels] * 3]
        self.mask_convs = nn.Sequential(
            *(layer for n in inputs for layer in (nn.Conv2d(n, width, 3, padding=1), nn.ReLU())),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.ReLU(),
        )
        self.mask_logits = nn.Conv2d(width, classes, 1)
        for module in (*self.mask_convs, self.mask_logits):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_logits.weight, std=0.001)

    def mask_head(self, features: list[Tensor], boxes: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Mask logits of RoIs, for one class each.

        Args:
            features: pyramid maps.
            boxes: B x [n, 4] or [B, n, 4].
            labels: [R] int64, image by image.

        Returns:
            [R, 28, 28] in the frame of the box: cell (i, j) is centred at ((j + .5) / 28, (i + .5) / 28) of its sides.
        """
        pooled = self.pool(features, boxes, MASK_POOL).unflatten(1, (MASK_POOL, MASK_POOL, -1)).permute(0, 3, 1, 2)
        with self.autocast(pooled):
            hidden = self.mask_convs(pooled).flatten(2)
            # the 1x1 convolution for the class that is asked for alone, which is a hundredth of COCO's
            weight, bias = self.mask_logits.weight.flatten(1)[labels], self.mask_logits.bias
            logits = (weight[:, None] @ hidden)[:, 0]
        assert bias is not None
        return (logits.float() + bias[labels][:, None]).unflatten(1, (MASK_SIDE, MASK_SIDE))

    def losses(self, views: Views) -> dict[str, Tensor]:
        """The four losses of Faster R-CNN and `mask`, each of weight 1; views without masks have no mask loss."""
        losses, features, rois = self.losses_and_rois(views)
        if views.masks is None:
            return losses
        positive = rois.labels < self.classes
        chosen = rois.select(positive)
        targets = []
        for masks, boxes, matched in zip(
            views.masks, chosen.boxes, chosen.matched.split([len(b) for b in chosen.boxes]), strict=True
        ):
            targets.append(mask_targets(masks, boxes, matched))
        logits = self.mask_head(features, chosen.boxes, chosen.labels)
        return losses | {"mask": mask_loss(logits, torch.cat(targets))}

    def detections(self, features: list[Tensor], sizes: Tensor) -> list[Detections]:
        """What `detect` finds at test, with masks: see `Detector.detections`."""
        found = super().detections(features, sizes)
        logits = self.mask_head(features, [d.boxes for d in found], torch.cat([d.labels for d in found]))
        masks = logits.sigmoid().split([len(d) for d in found])
        return [replace(d, masks=m) for d, m in zip(found, masks, strict=True)]


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """What of its object's mask lies in each RoI.

    Args:
        masks: [n, H, W] bool, of the objects of an image.
        boxes: [P, 4] RoIs in its pixels.
        matched: [P] int64, the object of each.

    Returns:
        [P, 28, 28] bool, in the frame of the RoI.
    """
    used, index = matched.unique(return_inverse=True)
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], 1)
    return roi_align(masks[used, None].float(), rois, MASK_SIDE, 1.0, 0, aligned=True)[:, 0] >= 0.5


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy: the mean over the pixels of all RoIs of all processes.

    Args:
        logits: [P, 28, 28] of the RoIs' own classes.
        targets: [P, 28, 28] bool.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")
    return loss / MASK_SIDE**2 / distributed.normalizer(len(targets), logits.device)
