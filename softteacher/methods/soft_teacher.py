"""Soft Teacher (paper, section 3): pseudo boxes -> box jittering -> reliability of negatives -> losses.

Where paper and authors' code differ, the code's form is the default and the paper's a setting; `docs/method.md` lists
the differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from softteacher.data.loader import Views
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
from softteacher.methods.base import PseudoBoxes, TeacherMethod, Unlabeled, to_strong_view
from softteacher.methods.diagnostics import box_counts
from softteacher.methods.jitter import jitter, regression_variance
from softteacher.methods.mixing import SEEN_BY_TEACHER, mix_boxes, mix_views, other_half


class SoftTeacher(TeacherMethod):
    """The unsupervised losses of a two-stage detector: RPN, classification and box regression."""

    student: FasterRCNN
    teacher: FasterRCNN

    def unsupervised_losses(
        self, found: list[Detections], part: Unlabeled
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `TeacherMethod`: each loss has pseudo boxes of its own."""
        s, d = self.settings, self.student.settings
        pool, strong, mixed = self.mix(self.pseudo_boxes(found, part), part)
        for_rpn, for_cls = (
            [self.confident(p.detections, threshold) for p in pool] for threshold in (s.rpn_threshold, s.cls_threshold)
        )
        for_reg = self.for_regression(pool, for_cls)

        features = self.student.features(strong.images)
        with torch.no_grad():
            rpn = self.student.rpn(features)
        unsure = [p.detections.boxes for p in pool] if s.rpn_ignore else None
        targets = rpn_targets(rpn.anchors, strong.sizes, [p.boxes for p in for_rpn], d.rpn_batch, part.noise, unsure)
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
                part.noise,
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
        weights = self.reliability(cls_rois, logits[is_cls], for_cls, part)
        if mixed and s.reliability in SEEN_BY_TEACHER:  # background is what is background in both
            weights = weights * self.reliability(cls_rois, logits[is_cls], for_cls, other_half(part))
        soft = self.soft_targets(cls_rois, part, mixed) if s.positives == "soft" else None
        losses["cls"] = classification_loss(logits[is_cls], cls_rois, weights, s.loss_normalization, soft)
        losses["box"] = regression_loss(deltas[~is_cls], reg_rois, s.loss_normalization)

        losses |= self.further_losses(features, cls_rois, pool, part)
        images = len(pool) * (1 + mixed)
        facts = box_counts(images, rpn=for_rpn, cls=for_cls, reg=for_reg, pool=[p.detections for p in pool])
        negative = cls_rois.labels == self.student.classes
        facts["reliability"] = float(weights[negative].mean()) if negative.any() else 1.0
        return losses, facts

    def mix(self, pool: list[PseudoBoxes], part: Unlabeled) -> tuple[list[PseudoBoxes], Views, bool]:
        """Pseudo boxes and strong views, laid over each other in some steps (`method.mixup`), and whether they are."""
        s, noise = self.settings, part.noise[0]
        if s.mixup > 0 and torch.rand(1, generator=noise, device=noise.device).item() < s.mixup:
            return mix_boxes(pool), mix_views(part.strong), True
        return pool, part.strong, False

    def for_regression(self, pool: list[PseudoBoxes], for_cls: list[Detections]) -> list[Detections]:
        """Boxes of a small variance (section 3.3), or those of the classification where jittering is switched off."""
        s, out = self.settings, []
        for p, c in zip(pool, for_cls, strict=True):
            if p.variance is None:
                out.append(c)
                continue
            good = p.variance < (torch.inf if s.reg_variance_threshold is None else s.reg_variance_threshold)
            if s.reg_confident:
                good &= self.thresholds.above(p.detections, s.cls_threshold)
            out.append(p.detections[good])
        return out

    def further_losses(
        self,
        features: list[Tensor],
        rois: RoIs,
        pool: list[PseudoBoxes],
        part: Unlabeled,
    ) -> dict[str, Tensor]:
        """Loss terms of other heads than Faster R-CNN's: here none.

        Args:
            features: the student's pyramid of the strong views.
            rois: sampled for the classification.
            pool: of each image.
            part: the teacher's features, and where the views lie.
        """
        return {}

    @torch.no_grad()
    def pseudo_boxes(self, found: list[Detections], part: Unlabeled) -> list[PseudoBoxes]:
        """The teacher's detections and their variance, carried from the weak to the strong views."""
        variances: list[Tensor] | list[None] = [None] * len(found)
        if self.settings.box_jitter:
            variances = self.box_variance(part.features, found, part.weak.sizes, part.noise)
        pool = []
        for d, variance, matrix, size in zip(found, variances, part.to_strong, part.strong.sizes, strict=True):
            moved, keep = to_strong_view(d, matrix, size)
            pool.append(PseudoBoxes(moved, None if variance is None else variance[keep], d[keep]))
        return pool

    @torch.no_grad()
    def box_variance(
        self, features: list[Tensor], found: list[Detections], sizes: Tensor, noise: list[torch.Generator]
    ) -> list[Tensor]:
        """Box jittering (section 3.3): how far the teacher's refinement of jittered copies spreads, for each box.

        Args:
            features: the teacher's pyramid.
            found: its detections on B views.
            sizes: [B, 2] (height, width) of the views.
            noise: of each image.

        Returns:
            B x [n], see `regression_variance`.
        """
        s, counts = self.settings, [len(d) for d in found]
        draw = torch.randn if s.jitter_law == "normal" else torch.rand
        copies = []
        for d, g in zip(found, noise, strict=True):
            offsets = draw(s.jitter_times, len(d), 4, generator=g, device=g.device)
            copies.append(jitter(d.boxes, offsets if s.jitter_law == "normal" else 2 * offsets - 1, s.jitter_scale))
        _, deltas = self.teacher.box_head(features, [c.flatten(0, 1) for c in copies])
        out = []
        parts = deltas.split([s.jitter_times * n for n in counts])
        for d, copy, delta, size in zip(found, copies, parts, sizes, strict=True):
            own_class = delta.unflatten(0, (s.jitter_times, len(d)))[:, torch.arange(len(d)), d.labels]
            refined = clip(decode(own_class, copy, HEAD_STD)[None], size[None])[0]
            out.append(regression_variance(refined, d.boxes if s.variance_normalization == "mean_side" else None))
        return out

    @torch.no_grad()
    def reliability(self, rois: RoIs, logits: Tensor, boxes: list[Detections], part: Unlabeled) -> Tensor:
        """The weight of each RoI: 1 for positives, `method.reliability` for negatives (section 3.2 and its ablation).

        Args:
            rois: R sampled RoIs in the strong views.
            logits: [R, C + 1], the student's.
            boxes: the pseudo boxes that made them positive or negative, in the strong views.
            part: the teacher's features, and where the views lie.

        Returns:
            [R] between 0 and 1.
        """
        kind, negative = self.settings.reliability, rois.labels == self.student.classes
        weights = torch.ones_like(rois.labels, dtype=torch.float32)
        if kind == "none":
            return weights
        places = rois.select(negative).boxes
        if kind in {"iou", "reverse_iou"}:
            pairs = zip(places, boxes, strict=True)
            iou = torch.cat([box_iou(p, d.boxes).amax(1) if len(d) else p.new_zeros(len(p)) for p, d in pairs])
            weights[negative] = iou if kind == "iou" else 1 - iou
            return weights
        student = logits[negative].softmax(-1)[:, -1]
        if kind == "student_background":
            weights[negative] = student
            return weights
        teacher = self.teacher_at(places, part)[:, -1]
        weights[negative] = teacher if kind == "teacher_background" else 1 - (student - teacher).abs()
        return weights

    @torch.no_grad()
    def soft_targets(self, rois: RoIs, part: Unlabeled, mixed: bool) -> Tensor:
        """[R, C + 1]: what the teacher sees in each positive (`method.positives`; Humble Teacher, arXiv 2106.10456).

        Where it wavers between classes, a pseudo box of the wrong one does less harm. Negatives stay background.
        """
        positive = rois.labels < self.student.classes
        places = rois.select(positive).boxes
        seen = self.teacher_at(places, part)
        if mixed:  # the object is in one of the two images
            other = self.teacher_at(places, other_half(part))
            seen = torch.where((seen[:, -1] < other[:, -1])[:, None], seen, other)
        targets = F.one_hot(rois.labels, self.student.classes + 1).to(seen.dtype)
        targets[positive] = seen
        return targets

    def teacher_at(self, places: list[Tensor], part: Unlabeled) -> Tensor:
        """The teacher's class distribution [R, C + 1] in the weak views at RoIs B x [n, 4] of the strong views."""
        back = zip(places, torch.linalg.inv(part.to_strong), part.weak.sizes, strict=True)
        seen, _ = self.teacher.box_head(part.features, [project_boxes(p, matrix, size) for p, matrix, size in back])
        return seen.softmax(-1)
