"""Soft Teacher for a one-stage detector: section 3 with locations in place of RoIs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from softteacher.detections import Detections
from softteacher.detectors.boxes import clip
from softteacher.detectors.fcos import FCOS, STRIDES, Dense, box_losses, dense_targets, focal_loss, inside
from softteacher.methods.base import Unlabeled
from softteacher.methods.diagnostics import box_counts
from softteacher.methods.jitter import regression_variance
from softteacher.methods.mixing import SEEN_BY_TEACHER, other_half
from softteacher.methods.soft_teacher import SoftTeacher


class OneStageSoftTeacher(SoftTeacher):
    """The method with an FCOS for student and teacher. The paper has two-stage detectors only. Here:

    - pseudo boxes are the teacher's detections, as there; their scores are sqrt(class * centerness);
    - the teacher's boxes at the `jitter_times` locations that fit a pseudo box best take the place of refined jittered
      copies: their spread is the box regression variance. Nothing is drawn;
    - pseudo boxes above `cls_threshold` are the classification's positives. A negative location weighs as much as the
      teacher believes that its place is background. loss = sum(w * focal) / max(positives, 1): of the thousands of
      locations nearly all are easy negatives whose focal loss is nearly 0, so that divided by the sum of weights
      nothing would be left of the positives (`loss_normalization` is of the two-stage form);
    - pseudo boxes under `reg_variance_threshold` teach boxes and centerness, in an assignment of their own.
    """

    student: FCOS  # type: ignore[assignment]
    teacher: FCOS  # type: ignore[assignment]

    @torch.no_grad()
    def box_variance(
        self, features: list[Tensor], found: list[Detections], sizes: Tensor, noise: list[torch.Generator]
    ) -> list[Tensor]:
        """See `SoftTeacher`: how far the teacher's boxes at the locations that fit a pseudo box best spread."""
        dense = self.teacher.predict(features)
        boxes, real = clip(dense.boxes, sizes), inside(dense.locations, sizes)
        times, out = min(self.settings.jitter_times, boxes.shape[1]), []
        paper = self.settings.variance_normalization == "mean_side"
        for d, box, used in zip(found, boxes, real, strict=True):
            best = (box_iou(d.boxes, box) * used).topk(times, dim=1).indices
            out.append(regression_variance(box[best.T], d.boxes if paper else None))
        return out

    def unsupervised_losses(
        self, found: list[Detections], part: Unlabeled
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `TeacherMethod`: classification, box and centerness, the first with pseudo boxes of its own."""
        classes = self.student.classes
        pool, strong, mixed = self.mix(self.pseudo_boxes(found, part), part)
        for_cls = [self.confident(p.detections, self.settings.cls_threshold) for p in pool]
        for_reg = self.for_regression(pool, for_cls)
        dense = self.student.predict(self.student.features(strong.images))
        cls_targets, reg_targets = (
            dense_targets(
                dense.locations, dense.strides, strong.sizes, [d.boxes for d in b], [d.labels for d in b], classes
            )
            for b in (for_cls, for_reg)
        )
        negative = (cls_targets.labels == classes) & cls_targets.used
        weights = self.reliability(dense, for_cls, part)
        if mixed and self.settings.reliability in SEEN_BY_TEACHER:  # background is what is background in both
            weights = weights * self.reliability(dense, for_cls, other_half(part))
        weights = torch.where(negative, weights, 1.0)
        losses = {"cls": focal_loss(dense.logits, cls_targets, weights)} | box_losses(dense, reg_targets)
        facts = box_counts(len(pool) * (1 + mixed), cls=for_cls, reg=for_reg, pool=[p.detections for p in pool])
        return losses, facts | {"reliability": float(weights[negative].mean())}

    @torch.no_grad()
    def reliability(  # type: ignore[override]
        self, dense: Dense, boxes: list[Detections], part: Unlabeled
    ) -> Tensor:
        """The weight of each location as a negative: `method.reliability` (section 3.2 and its ablation).

        Args:
            dense: the student's predictions in the strong views.
            boxes: the pseudo boxes that made locations positive, in the strong views.
            part: the teacher's features, and where the views lie.

        Returns:
            [B, L] between 0 and 1.
        """
        kind = self.settings.reliability
        if kind == "none":
            return torch.ones_like(dense.centerness)
        if kind in {"iou", "reverse_iou"}:  # of the box that the student sees there
            none = dense.boxes.new_zeros(1, 4)  # overlaps nothing
            pairs = zip(dense.boxes, boxes, strict=True)
            iou = torch.stack([box_iou(own, torch.cat([none, d.boxes])).amax(1) for own, d in pairs])
            return iou if kind == "iou" else 1 - iou
        student = background(dense)
        if kind == "student_background":
            return student
        seen = self.teacher.predict(part.features)
        teacher = look_up(background(seen), seen.shapes, dense, torch.linalg.inv(part.to_strong), part.weak.sizes)
        return teacher if kind == "teacher_background" else 1 - (student - teacher).abs()


def background(dense: Dense) -> Tensor:
    """How sure it is at each location that nothing is there, [B, L]: 1 - the highest score of a class."""
    return 1 - dense.logits.sigmoid().amax(-1)


def look_up(values: Tensor, shapes: list[tuple[int, int]], dense: Dense, matrices: Tensor, sizes: Tensor) -> Tensor:
    """Values of one view at the places of another view's locations, bilinearly interpolated.

    A location looks at the level whose stride covers what its own covers: where the view is shown at half the size, the
    level of half the stride. Places outside the view take the value at its edge.

    Args:
        values: [B, L'], a value for each location of the view.
        shapes: (height, width) of the levels of the view.
        dense: the locations of the other view, and their strides.
        matrices: [B, 3, 3] float64, affine, from the other view to this one.
        sizes: [B, 2] (height, width) of the view before padding.

    Returns:
        [B, L].
    """
    linear, shift = matrices[:, :2, :2], matrices[:, None, :2, 2]
    places = dense.locations.double() @ linear.mT + shift
    places = torch.minimum(places.clamp(min=0), sizes.flip(-1)[:, None].double())
    covered = dense.strides * torch.linalg.det(linear).abs().sqrt()[:, None]  # [B, L] pixels of this view
    level = (covered / STRIDES[0]).log2().round().clamp(0, len(STRIDES) - 1)
    out = torch.zeros_like(places[..., 0], dtype=values.dtype)
    parts = values.split([height * width for height, width in shapes], 1)
    for n, (part, (height, width)) in enumerate(zip(parts, shapes, strict=True)):
        extent = places.new_tensor([width, height]) * STRIDES[n]
        spots = (2 * places / extent - 1)[:, None].to(values.dtype)  # of grid_sample: -1 and 1 are the map's edges
        here = F.grid_sample(part.unflatten(1, (1, height, width)), spots, padding_mode="border", align_corners=False)
        out = torch.where(level == n, here[:, 0, 0], out)
    return out
