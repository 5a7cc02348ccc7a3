"""Soft Teacher (paper, section 3): pseudo boxes -> reliability of negatives -> box jittering -> losses.

Where paper and authors' code differ, this is the code's form; `docs/method.md` lists the differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softteacher.config import Settings
from softteacher.data.loader import Batch, Views
from softteacher.data.views import project_boxes
from softteacher.detections import Detections
from softteacher.detectors.boxes import HEAD_STD, clip, decode
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.detectors.losses import (
    RoIs,
    classification_loss,
    regression_loss,
    rpn_loss,
    rpn_targets,
    sample_rois,
)

MIN_SIDE = 1e-2  # pixels; a pseudo box that left the strong view has no side


@dataclass
class PseudoBoxes:
    """The pool of pseudo boxes of one image, in the strong view.

    Attributes:
        detections: the teacher's boxes with a score above `pool_threshold`.
        variance: [N] box regression variance (paper, Eq. 6-8).
        weak_boxes: [N, 4] where the teacher found them, in the weak view.
    """

    detections: Detections
    variance: Tensor
    weak_boxes: Tensor


class SoftTeacher:
    """L = L_sup + alpha * L_unsup (paper, Eq. 1).

    Args:
        student: learns.
        teacher: moving average of the student; labels the weak views.
        settings: thresholds, jitter, alpha.
    """

    def __init__(self, student: FasterRCNN, teacher: FasterRCNN, settings: Settings) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings.method

    def losses(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `softteacher.methods.Method`. Without unlabelled views (burn-in) the loss is the supervised one."""
        losses = self.student.losses(batch.labeled)
        if batch.weak is None or batch.strong is None:
            return losses, {}
        # matrices from the teacher's to the student's view (section 3.1)
        to_strong = batch.strong.matrices @ torch.linalg.inv(batch.weak.matrices)
        with torch.no_grad():
            teacher_features = self.teacher.features(batch.weak.images)
            noise = batch.strong.noise()
            pool = self.pseudo_boxes(teacher_features, batch.weak, batch.strong, to_strong, noise)
        unsup, facts = self.unsupervised_losses(teacher_features, pool, batch.weak, batch.strong, to_strong, noise)
        return losses | {f"unsup_{k}": self.settings.unsup_weight * v for k, v in unsup.items()}, facts

    def pseudo_boxes(
        self, features: list[Tensor], weak: Views, strong: Views, to_strong: Tensor, noise: list[torch.Generator]
    ) -> list[PseudoBoxes]:
        """The teacher's detections on the weak views, their variance, both carried to the strong views.

        Args:
            features: the teacher's pyramid of the weak views.
            weak: B views.
            strong: B views of the same images.
            to_strong: [B, 3, 3], weak -> strong view.
            noise: of each image.
        """
        boxes, scores, labels = self.teacher.detect(features, weak.sizes, training=True)
        found = [
            Detections(b, s, n)[s > self.settings.pool_threshold] for b, s, n in zip(boxes, scores, labels, strict=True)
        ]
        variances = self.box_variance(features, found, weak.sizes, noise)
        pool = []
        for d, variance, matrix, size in zip(found, variances, to_strong, strong.sizes, strict=True):
            projected = project_boxes(d.boxes, matrix, size)
            keep = (projected[:, 2:] - projected[:, :2]).amin(1) > MIN_SIDE
            pool.append(PseudoBoxes(Detections(projected, d.scores, d.labels)[keep], variance[keep], d.boxes[keep]))
        return pool

    def box_variance(
        self, features: list[Tensor], found: list[Detections], sizes: Tensor, noise: list[torch.Generator]
    ) -> list[Tensor]:
        """Box jittering (section 3.3): how far the teacher's refinement of jittered copies spreads, for each box."""
        times, counts = self.settings.jitter_times, [len(d) for d in found]
        copies = [
            jitter(d.boxes, torch.randn(times, len(d), 4, generator=g, device=g.device), self.settings.jitter_scale)
            for d, g in zip(found, noise, strict=True)
        ]
        _, deltas = self.teacher.box_head(features, [c.flatten(0, 1) for c in copies])
        out = []
        for d, copy, delta, size in zip(found, copies, deltas.split([times * n for n in counts]), sizes, strict=True):
            own_class = delta.unflatten(0, (times, len(d)))[:, torch.arange(len(d)), d.labels]
            refined = clip(decode(own_class, copy, HEAD_STD)[None], size[None])[0]
            out.append(regression_variance(refined))
        return out

    def unsupervised_losses(
        self,
        teacher_features: list[Tensor],
        pool: list[PseudoBoxes],
        weak: Views,
        strong: Views,
        to_strong: Tensor,
        noise: list[torch.Generator],
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """RPN, classification and regression losses on the strong views, each with pseudo boxes of its own."""
        s, d = self.settings, self.student.settings
        for_rpn = [p.detections[p.detections.scores > s.rpn_threshold] for p in pool]
        for_cls = [p.detections[p.detections.scores > s.cls_threshold] for p in pool]
        for_reg = [p.detections[p.variance < s.reg_variance_threshold] for p in pool]

        features = self.student.features(strong.images)
        with torch.no_grad():
            rpn = self.student.rpn(features)
        targets = rpn_targets(rpn.anchors, strong.sizes, [p.boxes for p in for_rpn], d.rpn_batch, noise)
        losses = rpn_loss(*self.student.rpn_at(features, targets.anchors), targets)

        proposals, scores = self.student.proposals(rpn, strong.sizes, training=True)
        cls_rois, reg_rois = (
            sample_rois(
                proposals,
                scores > 0,
                [p.boxes for p in b],
                [p.labels for p in b],
                d.roi_batch,
                self.student.classes,
                noise,
            )
            for b in (for_cls, for_reg)
        )
        # negatives have no box loss: of the second sample only the positives go through the box head, in one go with
        # the first, as it doesn't care whose RoIs it sees
        reg_rois = reg_rois.select(reg_rois.labels < self.student.classes)
        logits, deltas = self.student.box_head(
            features, [torch.cat(pair) for pair in zip(cls_rois.boxes, reg_rois.boxes, strict=True)]
        )
        is_cls = torch.cat(
            [torch.arange(len(c) + len(r)) < len(c) for c, r in zip(cls_rois.boxes, reg_rois.boxes, strict=True)]
        )
        weights = self.reliability(teacher_features, cls_rois, weak, to_strong)
        losses["cls"] = classification_loss(logits[is_cls], cls_rois, weights)
        losses["box"] = regression_loss(deltas[~is_cls], reg_rois)

        in_weak = [Detections(p.weak_boxes, p.detections.scores, p.detections.labels) for p in pool]
        sure = [d[d.scores > s.cls_threshold] for d in in_weak]
        losses |= self.further_losses(features, cls_rois, sure, teacher_features, to_strong)

        count = len(pool)
        negative = cls_rois.labels == self.student.classes
        facts = {
            f"pseudo_boxes_{k}": sum(len(p) for p in b) / count
            for k, b in (("rpn", for_rpn), ("cls", for_cls), ("reg", for_reg))
        }
        facts["pseudo_boxes_pool"] = sum(len(p.variance) for p in pool) / count
        facts["reliability"] = float(weights[negative].mean()) if negative.any() else 1.0
        return losses, facts

    def further_losses(
        self,
        features: list[Tensor],
        rois: RoIs,
        sure: list[Detections],
        teacher_features: list[Tensor],
        to_strong: Tensor,
    ) -> dict[str, Tensor]:
        """Loss terms of other heads than Faster R-CNN's: here none.

        Args:
            features: the student's pyramid of the strong views.
            rois: sampled for the classification.
            sure: the pseudo boxes that teach the classification, in the weak views.
            teacher_features: the teacher's pyramid of the weak views.
            to_strong: [B, 3, 3], weak -> strong view.
        """
        return {}

    @torch.no_grad()
    def reliability(self, teacher_features: list[Tensor], rois: RoIs, weak: Views, to_strong: Tensor) -> Tensor:
        """The weight of each RoI (section 3.2): 1 for positives, the teacher's background score for negatives.

        Args:
            teacher_features: the teacher's pyramid of the weak views.
            rois: sampled RoIs in the strong views.
            weak: B weak views.
            to_strong: [B, 3, 3], weak -> strong view.

        Returns:
            [R] between 0 and 1.
        """
        negative = rois.labels == self.student.classes
        back = torch.linalg.inv(to_strong)
        places = zip(rois.select(negative).boxes, back, weak.sizes, strict=True)
        logits, _ = self.teacher.box_head(teacher_features, [project_boxes(b, m, size) for b, m, size in places])
        weights = torch.ones_like(rois.labels, dtype=torch.float32)
        weights[negative] = logits.softmax(-1)[:, -1]
        return weights


def jitter(boxes: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Jittered copies of boxes: `box + noise * scale * (w, h, w, h)`, not clipped.

    Args:
        boxes: [N, 4] xyxy.
        noise: [T, N, 4], standard normal.
        scale: standard deviation as a share of width and height (at least one pixel each).

    Returns:
        [T, N, 4].
    """
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
    return boxes + noise * scale * size


def regression_variance(refined: Tensor) -> Tensor:
    """Box regression variance (paper, Eq. 6-8; in the code's form, each coordinate over its own side).

    Args:
        refined: [T, N, 4], the T refined copies of N boxes.

    Returns:
        [N], the unbiased standard deviation over the copies relative to the mean box's sides, mean of 4 coordinates.
    """
    mean = refined.mean(0)
    size = (mean[:, 2:] - mean[:, :2]).clamp(min=1).repeat(1, 2)
    # not std(0): it warns where there are no boxes
    deviation = ((refined - mean).square().sum(0) / (len(refined) - 1)).sqrt()
    return (deviation / size).mean(1)
