"""STAC (arXiv 2005.04757), the multi-stage baseline: train, label offline once, train again on both."""

from __future__ import annotations

from torch import Tensor

from softteacher.data.loader import Batch
from softteacher.methods.base import Method


class Stac(Method):
    """The second training: the strong views come with the boxes that a finished teacher found before it began.

    `softteacher.training.self_label` makes them, from the scores above `method.cls_threshold`.
    """

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `Method`: L_sup + `method.unsup_weight` * L_unsup, the same losses on both."""
        losses = self.labeled_losses(batch)
        if batch.strong is None or not self.trust:
            return losses, {}
        weight, views = self.settings.unsup_weight * self.trust, batch.strong
        facts = {"pseudo_boxes_cls": sum(map(len, views.boxes)) / len(views.boxes)}
        return losses | {f"unsup_{k}": weight * v for k, v in self.student.losses(views).items()}, facts
