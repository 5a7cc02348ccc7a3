"""Soft Teacher for instance segmentation: the masks of pseudo boxes follow the views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softteacher.detectors.losses import RoIs
from softteacher.detectors.mask_rcnn import MASK_SIDE, MaskRCNN, mask_loss
from softteacher.methods.base import PseudoBoxes, Unlabeled
from softteacher.methods.soft_teacher import SoftTeacher


class MaskSoftTeacher(SoftTeacher):
    """Soft Teacher whose pseudo boxes have masks, which teach the student's mask head.

    The teacher draws the mask in the box that it found in the weak view. The target of a RoI in the strong view is read
    from it point by point, so that no mask is ever warped or as large as an image.
    """

    student: MaskRCNN
    teacher: MaskRCNN

    def further_losses(
        self,
        features: list[Tensor],
        rois: RoIs,
        pool: list[PseudoBoxes],
        part: Unlabeled,
    ) -> dict[str, Tensor]:
        """The mask loss of the positives of the classification's sample; see `SoftTeacher.further_losses`."""
        sure = [self.confident(p.found, self.settings.cls_threshold) for p in pool]
        positive = rois.select(rois.labels < self.student.classes)
        counts = [len(b) for b in positive.boxes]
        with torch.no_grad():
            labels = torch.cat([d.labels for d in sure])
            logits = self.teacher.mask_head(part.features, [d.boxes for d in sure], labels)
            masks = logits.sigmoid().split([len(d) for d in sure])
            parts = zip(positive.boxes, positive.matched.split(counts), sure, masks, part.to_strong, strict=True)
            targets = [pseudo_mask_targets(b, d.boxes[m], k[m], t) for b, m, d, k, t in parts]
        found = self.student.mask_head(features, positive.boxes, positive.labels)
        return {"mask": mask_loss(found, torch.cat(targets))}


def pseudo_mask_targets(rois: Tensor, boxes: Tensor, masks: Tensor, to_strong: Tensor) -> Tensor:
    """What of the teacher's mask lies in each RoI: the centre of each cell, carried back to the weak view.

    Args:
        rois: [P, 4] in the strong view.
        boxes: [P, 4] the pseudo box of each, in the weak view.
        masks: [P, 28, 28] probabilities in the frame of the pseudo box.
        to_strong: [3, 3], weak -> strong view.

    Returns:
        [P, 28, 28] bool, in the frame of the RoI.
    """
    share = (torch.arange(MASK_SIDE, device=rois.device) + 0.5) / MASK_SIDE
    size = rois[:, 2:] - rois[:, :2]
    x = (rois[:, :1] + size[:, :1] * share)[:, None, :].expand(-1, MASK_SIDE, -1)
    y = (rois[:, 1:2] + size[:, 1:] * share)[:, :, None].expand(-1, -1, MASK_SIDE)
    back = torch.linalg.inv(to_strong).to(rois.dtype)
    points = torch.stack([x, y, torch.ones_like(x)], -1) @ back.T
    points = points[..., :2] / points[..., 2:]
    place = (points - boxes[:, None, None, :2]) / (boxes[:, 2:] - boxes[:, :2])[:, None, None].clamp(min=1e-6) * 2 - 1
    values = F.grid_sample(masks[:, None], place, padding_mode="border", align_corners=False)[:, 0]
    return (values >= 0.5) & (place.abs() <= 1).all(-1)
