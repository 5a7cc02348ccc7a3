"""Pseudo mixup (MixPL, arXiv 2312.07006): two strong views in one image, with the pseudo boxes of both."""

from __future__ import annotations

from dataclasses import replace

import torch

from softteacher.data.loader import Views
from softteacher.detections import Detections
from softteacher.methods.base import PseudoBoxes, Unlabeled

SEEN_BY_TEACHER = {"teacher_background", "prediction_difference"}  # reliabilities that each half has one of


def mix_views(views: Views) -> Views:
    """Each view and the next one of the batch, half and half, at the top left of the same canvas."""
    images = ((views.images.int() + views.images.roll(1, 0).int() + 1) // 2).to(torch.uint8)
    return replace(views, images=images, sizes=torch.maximum(views.sizes, views.sizes.roll(1, 0)))


def mix_boxes(pool: list[PseudoBoxes]) -> list[PseudoBoxes]:
    """The pseudo boxes of each image and of the one that `mix_views` puts over it."""
    return [
        replace(
            mine,
            detections=_both(mine.detections, other.detections),
            variance=None
            if mine.variance is None or other.variance is None
            else torch.cat([mine.variance, other.variance]),
            found=_both(mine.found, other.found),
        )
        for mine, other in zip(pool, [pool[-1], *pool[:-1]], strict=True)
    ]


def other_half(part: Unlabeled) -> Unlabeled:
    """Where the teacher saw what `mix_views` puts over each image."""
    return replace(
        part,
        weak=replace(part.weak, images=part.weak.images.roll(1, 0), sizes=part.weak.sizes.roll(1, 0)),
        to_strong=part.to_strong.roll(1, 0),
        features=[f.roll(1, 0) for f in part.features],
    )


def _both(a: Detections, b: Detections) -> Detections:
    return Detections(*(torch.cat([x, y]) for x, y in ((a.boxes, b.boxes), (a.scores, b.scores), (a.labels, b.labels))))
