"""Numbers that answer "why is it not learning": what the teacher finds, and how much of it is true."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softteacher.detections import Detections, match_boxes


def score_histogram(scores: Tensor) -> dict[str, float]:
    """Detections per image in each tenth of the score, `teacher_scores/0.5` for .5 to .6; from scores [B, K]."""
    tenth = (scores[scores > 0] * 10).long().clamp(max=9)
    counts = torch.bincount(tenth, minlength=10).tolist()
    return {f"teacher_scores/{n / 10}": count / len(scores) for n, count in enumerate(counts)}


def box_counts(images: int, **kinds: list[Detections]) -> dict[str, float]:
    """Pseudo boxes per image, `pseudo_boxes_<kind>`, from those of each kind over so many images."""
    return {f"pseudo_boxes_{kind}": sum(map(len, boxes)) / images for kind, boxes in kinds.items()}


def pseudo_box_quality(found: list[Detections], boxes: list[Tensor], labels: list[Tensor]) -> dict[str, float]:
    """Precision and recall of pseudo boxes against hidden labels at IoU .5, which no loss ever sees.

    Images without objects are left out: of most nothing is known, as they came without labels beside others with them.

    Args:
        found: the pseudo boxes of each image.
        boxes: B x [n, 4] the truth in the same view.
        labels: B x [n].

    Returns:
        `pseudo_precision` (nan without pseudo boxes) and `pseudo_recall` (nan without objects), over all images.
    """
    hits, claimed, there = 0, 0, 0
    for d, truth, classes in zip(found, boxes, labels, strict=True):
        if not len(truth):
            continue
        objects = Detections(truth, truth.new_ones(len(truth)), classes)
        hits += len(match_boxes(d.numpy(), objects.numpy(), iou=0.5))
        claimed, there = claimed + len(d), there + len(truth)
    return {
        "pseudo_precision": hits / claimed if claimed else math.nan,
        "pseudo_recall": hits / there if there else math.nan,
    }
