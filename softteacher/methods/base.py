"""The interface between a method and the trainer, and what methods with a teacher share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softteacher.config import Settings
from softteacher.data.loader import Batch, Views
from softteacher.data.views import project_boxes
from softteacher.detections import Detections
from softteacher.detectors.base import Detector
from softteacher.methods.diagnostics import pseudo_box_quality, score_histogram
from softteacher.methods.thresholds import ClassThresholds

MIN_SIDE = 1e-2  # pixels; a pseudo box that left the strong view has no side


class Method:
    """Gives the losses of a batch.

    Args:
        student: learns.
        teacher: moving average of the student.
        settings: all of them.
        frequency: labelled boxes per labelled image, by class name in label order.

    Attributes:
        frequency: [C], the same as a tensor.
        classes: C names.
        trust: what the unsupervised loss is multiplied by besides `method.unsup_weight`; the trainer's guard lowers it.
        seen: [C] how often each class was taught by a pseudo box so far; none for methods without pseudo boxes.
    """

    def __init__(self, student: Detector, teacher: Detector, settings: Settings, frequency: dict[str, float]) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings.method
        self.frequency = torch.tensor(list(frequency.values()), dtype=torch.float32, device=student.mean.device)
        self.classes = list(frequency)
        self.trust = 1.0
        self.seen: Tensor | None = None

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted loss terms whose sum is minimised, and numbers for the log.

        The loss of a batch is the sum of those of its `parts`. Of unlabelled images alone there may be none.
        """
        raise NotImplementedError

    def labeled_losses(self, batch: Batch) -> dict[str, Tensor]:
        """What the labelled images of a batch teach; nothing where it has none."""
        return self.student.losses(batch.labeled) if batch.labeled else {}

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the weights; for checkpoints."""
        return {"trust": self.trust, "seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`, whose tensors may be on another device."""
        self.trust, seen = state["trust"], state["seen"]
        self.seen = None if seen is None else seen.to(self.frequency.device)


@dataclass
class Unlabeled:
    """The unlabelled half of a step.

    Attributes:
        weak: B views, the teacher's.
        strong: B views of the same images, the student's.
        to_strong: [B, 3, 3] float64, weak -> strong view.
        features: the teacher's pyramid of the weak views.
        noise: a generator per image, for everything that is drawn for it.
    """

    weak: Views
    strong: Views
    to_strong: Tensor
    features: list[Tensor]
    noise: list[torch.Generator]


@dataclass
class PseudoBoxes:
    """The pool of pseudo boxes of one image, in the strong view.

    Attributes:
        detections: the teacher's boxes with a score above `pool_threshold`.
        variance: [N] box regression variance (paper, Eq. 6-8); none where box jittering is switched off.
        found: the same boxes where the teacher found them, in the weak view.
    """

    detections: Detections
    variance: Tensor | None
    found: Detections


class TeacherMethod(Method):
    """L = L_sup + alpha * L_unsup (paper, Eq. 1): the teacher labels weak views, the student learns on strong ones."""

    def __init__(self, student: Detector, teacher: Detector, settings: Settings, frequency: dict[str, float]) -> None:
        super().__init__(student, teacher, settings, frequency)
        self.thresholds = ClassThresholds(settings.method, self.frequency)
        self.seen: Tensor = torch.zeros_like(self.frequency)

    def unsupervised_losses(
        self, found: list[Detections], part: Unlabeled
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Loss terms on the strong views, and numbers for the log.

        Args:
            found: the teacher's boxes with a score above `pool_threshold`, in the weak views.
            part: everything else.
        """
        raise NotImplementedError

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `Method`. Without unlabelled views (burn-in), or without trust, the supervised losses alone."""
        losses = self.labeled_losses(batch)
        if batch.weak is None or batch.strong is None or not self.trust:
            return losses, {}
        # matrices from the teacher's to the student's view (section 3.1)
        to_strong = batch.strong.matrices @ torch.linalg.inv(batch.weak.matrices)
        with torch.no_grad():
            features = self.teacher.features(batch.weak.images)
            boxes, scores, labels = self.teacher.detect(features, batch.weak.sizes, training=True)
            self.thresholds.observe(scores, labels)
            found = [
                Detections(b, s, n)[s > self.settings.pool_threshold]
                for b, s, n in zip(boxes, scores, labels, strict=True)
            ]
        part = Unlabeled(batch.weak, batch.strong, to_strong, features, batch.strong.noise())
        unsup, facts = self.unsupervised_losses(found, part)
        sure = [self.confident(d, self.settings.cls_threshold) for d in found]
        self.seen = self.seen + torch.bincount(torch.cat([d.labels for d in sure]), minlength=len(self.frequency))
        facts |= score_histogram(scores) | self.thresholds.facts()
        if batch.weak.boxes:
            facts |= pseudo_box_quality(sure, batch.weak.boxes, batch.weak.labels)
        weight = self.settings.unsup_weight * self.trust
        weighted = {f"unsup_{k}": weight * v for k, v in unsup.items()}
        return losses | weighted, facts

    def confident(self, found: Detections, threshold: float) -> Detections:
        """The boxes that teach: score above the threshold, or above that of their class (`method.threshold`)."""
        return found[self.thresholds.above(found, threshold)]

    def state(self) -> dict[str, Any]:
        """See `Method`."""
        return super().state() | self.thresholds.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Method`."""
        super().load_state(state)
        self.thresholds.load_state(state)


def to_strong_view(found: Detections, matrix: Tensor, size: Tensor) -> tuple[Detections, Tensor]:
    """Boxes carried to the strong view, those that left it dropped.

    Args:
        found: boxes in the weak view.
        matrix: [3, 3], weak -> strong view.
        size: (height, width) of the strong view.

    Returns:
        The boxes, and which of `found` they are: [N] bool.
    """
    projected = project_boxes(found.boxes, matrix, size)
    keep = (projected[:, 2:] - projected[:, :2]).amin(1) > MIN_SIDE
    return Detections(projected, found.scores, found.labels)[keep], keep
