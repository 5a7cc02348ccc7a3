"""Assignment, sampling and the losses of a two-stage detector, as mmdetection 3.3.0 has them (checked in tests)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from softteacher import distributed
from softteacher.detectors.boxes import HEAD_STD, RPN_STD, encode


def assign(
    candidates: Tensor, boxes: Tensor, positive: float, negative: float, low_quality: bool, min_positive: float = 0.0
) -> Tensor:
    """Match candidates (anchors or proposals) to ground truth by IoU.

    Args:
        candidates: [N, 4].
        boxes: [G, 4], possibly none.
        positive: IoU from which a candidate is positive.
        negative: IoU under which it is negative; in between it is ignored.
        low_quality: every box takes the candidates of its highest IoU, if that is at least `min_positive`.
        min_positive: lowest IoU at which `low_quality` matches.

    Returns:
        [N] int64: index of the matched box, -1 for negative, -2 for ignored.
    """
    matched = candidates.new_full((len(candidates),), -1, dtype=torch.int64)
    if not len(boxes):
        return matched
    iou = box_iou(boxes, candidates)
    best, index = iou.max(0)
    matched[best >= negative] = -2
    matched = torch.where(best >= positive, index, matched)
    if low_quality:
        highest = iou.amax(1, keepdim=True)
        taken = (iou == highest) & (highest >= min_positive)
        number = torch.arange(1, len(boxes) + 1, device=iou.device)
        last = (taken * number[:, None]).amax(0)  # where several boxes claim a candidate the last one has it
        matched = torch.where(last > 0, last - 1, matched)
    return matched


def sample(matched: Tensor, count: int, positive_share: float, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positives and negatives at random: at most `count` in all, at most the share of positives.

    Args:
        matched: [N], see `assign`.
        count: how many.
        positive_share: of `count`.
        noise: the image's own, so that a draw doesn't depend on which images share a batch.

    Returns:
        Indices of the positives and of the negatives.
    """
    positives, negatives = torch.nonzero(matched >= 0).flatten(), torch.nonzero(matched == -1).flatten()
    # a key for each candidate, not a permutation: where rounding changes one match the others are drawn as before
    keys = torch.rand(len(matched), generator=noise, device=matched.device)
    positives = _draw(positives, int(count * positive_share), keys)
    return positives, _draw(negatives, count - len(positives), keys)


class RPNTargets(NamedTuple):
    """The sampled anchors of a batch: index into the flattened [B, A], is it an object, deltas of the positives."""

    anchors: Tensor
    objectness: Tensor
    deltas: Tensor


def rpn_targets(
    anchors: Tensor,
    sizes: Tensor,
    boxes: list[Tensor],
    count: int,
    noise: list[torch.Generator],
    unsure: list[Tensor] | None = None,
) -> RPNTargets:
    """Sampled anchors for each image.

    Args:
        anchors: [A, 4], all levels.
        sizes: [B, 2] (height, width); anchors centred in the padding are not used.
        boxes: B x [n, 4].
        count: anchors per image.
        noise: B generators, see `sample`.
        unsure: B x [n, 4], maybe objects: anchors on them (IoU from 0.3) are no negatives.
    """
    index, objectness, deltas = [], [], []
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    for n, (size, box, own) in enumerate(zip(sizes, boxes, noise, strict=True)):
        matched = assign(anchors, box, 0.7, 0.3, low_quality=True, min_positive=0.3)
        matched = torch.where((centre < size.flip(0)).all(1), matched, -2)
        if unsure is not None:
            maybe = assign(anchors, unsure[n], 0.7, 0.3, low_quality=False)
            matched = torch.where((matched == -1) & (maybe != -1), -2, matched)
        positive, negative = sample(matched, count, 0.5, own)
        index += [n * len(anchors) + positive, n * len(anchors) + negative]
        objectness += [torch.ones(len(positive)), torch.zeros(len(negative))]
        deltas.append(encode(box[matched[positive]], anchors[positive], RPN_STD))
    return RPNTargets(torch.cat(index), torch.cat(objectness).to(anchors.device), torch.cat(deltas))


def rpn_loss(logits: Tensor, deltas: Tensor, targets: RPNTargets) -> dict[str, Tensor]:
    """Binary cross-entropy and L1, each summed over the sampled anchors and divided by their number.

    Args:
        logits: [S], of the sampled anchors.
        deltas: [S, 4].
        targets: the sampled anchors.
    """
    count = distributed.normalizer(len(targets.anchors), logits.device)
    return {
        "rpn_cls": F.binary_cross_entropy_with_logits(logits, targets.objectness, reduction="sum") / count,
        "rpn_box": (deltas[targets.objectness > 0] - targets.deltas).abs().sum() / count,
    }


class RoIs(NamedTuple):
    """Sampled RoIs of a batch, image by image.

    Attributes:
        boxes: B x [n, 4].
        labels: [R] int64; the background is class C.
        targets: [R, 4] the matched box of a positive, the RoI itself otherwise.
        sampled: number of RoIs that were sampled, see `softteacher.distributed.normalizer`.
        matched: [R] int64, which of its image's boxes a positive is matched to; -1 for negatives.
    """

    boxes: list[Tensor]
    labels: Tensor
    targets: Tensor
    sampled: Tensor
    matched: Tensor

    def select(self, keep: Tensor) -> RoIs:
        """Those RoIs that a mask [R] keeps; their number before stays."""
        masks = keep.split([len(b) for b in self.boxes])
        boxes = [b[m] for b, m in zip(self.boxes, masks, strict=True)]
        return RoIs(boxes, self.labels[keep], self.targets[keep], self.sampled, self.matched[keep])


def sample_rois(
    proposals: Tensor,
    valid: Tensor,
    boxes: list[Tensor],
    labels: list[Tensor],
    count: int,
    classes: int,
    noise: list[torch.Generator],
) -> RoIs:
    """Assign and sample RoIs; the ground truth is added to the proposals.

    Args:
        proposals: [B, P, 4].
        valid: [B, P] bool.
        boxes: B x [n, 4] ground truth or pseudo boxes.
        labels: B x [n].
        count: RoIs per image, a quarter of them positive at most.
        classes: number of classes C.
        noise: B generators, see `sample`.
    """
    rois, roi_labels, targets, matches = [], [], [], []
    for proposal, real, box, label, own in zip(proposals, valid, boxes, labels, noise, strict=True):
        candidates = torch.cat([box, proposal[real]])
        matched = assign(candidates, box, 0.5, 0.5, low_quality=False)
        positive, negative = sample(matched, count, 0.25, own)
        rois.append(candidates[torch.cat([positive, negative])])
        roi_labels += [label[matched[positive]], label.new_full((len(negative),), classes)]
        targets += [box[matched[positive]], candidates[negative]]
        matches += [matched[positive], matched[negative]]
    sampled = distributed.normalizer(sum(len(r) for r in rois), proposals.device)
    return RoIs(rois, torch.cat(roi_labels), torch.cat(targets), sampled, torch.cat(matches))


def classification_loss(
    logits: Tensor,
    rois: RoIs,
    weights: Tensor | None = None,
    normalization: str = "weights",
    soft: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, weighted: sum(w * CE) / max(sum(w), 1). Without weights the mean.

    Args:
        logits: [R, C + 1].
        rois: their labels.
        weights: [R], 1 for positives, the reliability for negatives (Soft Teacher).
        normalization: `weights`, see above; `paper`: the mean over positives plus the weighted mean over negatives
            (paper, Eq. 4-5).
        soft: [R, C + 1] distributions to learn in place of the labels.
    """
    loss = F.cross_entropy(logits, rois.labels if soft is None else soft, reduction="none")
    if weights is None:
        return loss.sum() / rois.sampled
    positive = rois.labels < logits.shape[1] - 1
    parts = (positive, ~positive) if normalization == "paper" else (torch.ones_like(positive),)
    means = [(loss * weights)[p].sum() / distributed.normalizer(weights[p].sum(), logits.device) for p in parts]
    return torch.stack(means).sum()


def regression_loss(deltas: Tensor, rois: RoIs, normalization: str = "weights") -> Tensor:
    """L1 between the deltas of the RoIs' own classes and their targets, over the number of sampled RoIs.

    Args:
        deltas: [R, C, 4].
        rois: labels and matched boxes.
        normalization: `paper`: over the number of positives (paper, Eq. 9).
    """
    positive = torch.nonzero(rois.labels < deltas.shape[1]).flatten()
    targets = encode(rois.targets[positive], torch.cat(rois.boxes)[positive], HEAD_STD)
    count = distributed.normalizer(len(positive), deltas.device) if normalization == "paper" else rois.sampled
    return (deltas[positive, rois.labels[positive]] - targets).abs().sum() / count


def _draw(index: Tensor, count: int, keys: Tensor) -> Tensor:
    return index[keys[index].topk(count).indices] if len(index) > count else index
