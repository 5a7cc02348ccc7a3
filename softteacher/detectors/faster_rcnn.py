"""Faster R-CNN on a feature pyramid, in one class for training, evaluation and export.

Everything between the networks is of fixed shape (top-k and masks instead of filtering), so that the graph that is
exported is the one that was scored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from softteacher.config import DetectorSettings
from softteacher.data.loader import Views
from softteacher.detectors.base import Detector
from softteacher.detectors.boxes import HEAD_STD, RPN_STD, anchors, clip, decode, nms_mask
from softteacher.detectors.losses import RoIs, classification_loss, regression_loss, rpn_loss, rpn_targets, sample_rois
from softteacher.detectors.roi_pool import POOL, roi_pool

STRIDES = [4, 8, 16, 32, 64]
CANDIDATES = 10  # scored boxes that enter the class-wise NMS, per detection that may leave it


class RPNOutput(NamedTuple):
    """Logits [B, A], deltas [B, A, 4] and anchors [A, 4] over all levels; `per_level` holds the anchors in each."""

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    per_level: list[int]


class FasterRCNN(Detector):
    """Two-stage detector.

    Args:
        backbone: four stages in a row, their outputs of strides 4, 8, 16, 32.
        channels: the channels of these outputs.
        classes: number of classes C; the background is logit C, the last one.
        settings: widths, numbers of proposals, thresholds.
    """

    class_heads: tuple[str, ...] = ("head_logits", "head_deltas")

    def __init__(self, backbone: nn.ModuleList, channels: list[int], classes: int, settings: DetectorSettings) -> None:
        super().__init__(backbone, channels, classes, settings, LastLevelMaxPool())
        self.strides = STRIDES[self.first_level :]
        width, hidden = settings.fpn_channels, settings.head_channels
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_logits = nn.Conv2d(width, 3, 1)
        self.rpn_deltas = nn.Conv2d(width, 12, 1)
        self.head = nn.Sequential(
            nn.Linear(POOL * POOL * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head_logits = nn.Linear(hidden, classes + 1)
        self.head_deltas = nn.Linear(hidden, classes * 4)
        layers: list[nn.Conv2d | nn.Linear] = [self.rpn_conv, self.rpn_logits, self.rpn_deltas, self.head_logits]
        for layer in (*layers, self.head_deltas):
            nn.init.normal_(layer.weight, std=0.001 if layer is self.head_deltas else 0.01)
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for module in (*layers, self.head_deltas, *self.head):
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def rpn(self, features: list[Tensor]) -> RPNOutput:
        """Objectness and box deltas of every anchor."""
        logits, deltas = [], []
        for feature in features:
            with self.autocast(feature):
                both = self._rpn_heads(F.relu(self.rpn_conv(feature)).permute(0, 2, 3, 1)).float()
            logits.append(both[..., :3].flatten(1))
            deltas.append(both[..., 3:].reshape(both.shape[0], -1, 4))
        shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        levels = anchors(shapes, self.strides, self.settings.anchor_scale, features[0].device)
        return RPNOutput(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(levels), [len(a) for a in levels])

    def rpn_at(self, features: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness and box deltas of some anchors: what `rpn` gives there, at the cost of these alone.

        A loss on 256 anchors an image would send a gradient of zeros through all others.

        Args:
            features: pyramid maps.
            index: [S] int64 into the flattened [B, A].

        Returns:
            Logits [S] and deltas [S, 4].
        """
        cells = [f.shape[2] * f.shape[3] for f in features]
        image, anchor = index // (3 * sum(cells)), index % (3 * sum(cells))
        around = torch.arange(-1, 2, device=index.device)
        patches, order, start = [], [], 0
        for feature, count in zip(features, cells, strict=True):
            here = torch.nonzero((anchor >= 3 * start) & (anchor < 3 * (start + count))).flatten()
            cell, (height, width) = anchor[here] // 3 - start, feature.shape[2:]
            y = (cell // width)[:, None, None] + around[:, None]
            x = (cell % width)[:, None, None] + around
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            patch = feature.permute(0, 2, 3, 1)[image[here, None, None], y.clamp(0, height - 1), x.clamp(0, width - 1)]
            patches.append((patch * inside[..., None]).flatten(1))
            order.append(here)
            start += count
        with self.autocast(features[0]):
            kernel = self.rpn_conv.weight.permute(0, 2, 3, 1).flatten(1)
            both = self._rpn_heads(F.relu(F.linear(torch.cat(patches), kernel, self.rpn_conv.bias))).float()
        back = torch.cat(order).argsort()
        both, which = both[back], anchor % 3
        deltas = both[:, 3:].unflatten(1, (3, 4))
        return both[:, :3].gather(1, which[:, None])[:, 0], deltas[torch.arange(len(index)), which]

    @torch.no_grad()
    def proposals(self, rpn: RPNOutput, sizes: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The best boxes of the RPN after NMS in each level.

        Args:
            rpn: output of `rpn`.
            sizes: [B, 2] (height, width) to clip to.
            training: the number of proposals in training (also the teacher's), or at test.

        Returns:
            Boxes [B, P, 4], best first, and scores [B, P]; a score of 0 marks a place that is not used.
        """
        s = self.settings
        pre_nms, count = (s.pre_nms_train, s.proposals_train) if training else (s.pre_nms_test, s.proposals_test)
        boxes, scores = [], []
        start = 0
        for size in rpn.per_level:
            logits, index = rpn.logits[:, start : start + size].topk(min(pre_nms, size), dim=1)
            index = index + start
            deltas = rpn.deltas.gather(1, index[..., None].expand(-1, -1, 4))
            box = clip(decode(deltas, rpn.anchors[index], RPN_STD), sizes)
            score = logits.sigmoid() * (box[..., 2:] > box[..., :2]).all(-1)
            scores.append(score * nms_mask(box, score, torch.zeros_like(index), 0.7))
            boxes.append(box)
            start += size
        all_boxes, all_scores = torch.cat(boxes, 1), torch.cat(scores, 1)
        best, index = all_scores.topk(min(count, all_scores.shape[1]), dim=1)
        return all_boxes.gather(1, index[..., None].expand(-1, -1, 4)), best

    def box_head(self, features: list[Tensor], boxes: list[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of RoIs.

        Args:
            features: pyramid maps.
            boxes: B x [n, 4] or [B, n, 4].

        Returns:
            Logits [R, C + 1] and deltas [R, C, 4], image by image.
        """
        pooled = self.pool(features, boxes, POOL)
        with self.autocast(pooled):
            hidden = self.head(pooled)
            logits, deltas = self.head_logits(hidden), self.head_deltas(hidden)
        return logits.float(), deltas.float().unflatten(1, (self.classes, 4))

    def pool(self, features: list[Tensor], boxes: list[Tensor] | Tensor, side: int) -> Tensor:
        """RoIs pooled to side x side bins: [R, side * side * channels], see `roi_pool`; arguments as of `box_head`."""
        # a tensor keeps the batch dimension symbolic in the exported graph, where a loop would fix it
        if isinstance(boxes, Tensor):
            image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2]).flatten()
            flat = boxes.flatten(0, 1)
        else:
            image = torch.cat([b.new_full((len(b),), n, dtype=torch.int64) for n, b in enumerate(boxes)])
            flat = torch.cat(boxes)
        rois = torch.cat([image[:, None].to(flat.dtype), flat], 1)
        return roi_pool(features[:-1], self.strides[:-1], rois, self.settings.sampling_ratio, side)

    def detect(self, features: list[Tensor], sizes: Tensor, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """See `Detector`; in training with as many proposals as training has."""
        proposals, valid = self.proposals(self.rpn(features), sizes, training)
        logits, deltas = self.box_head(features, proposals)
        batch, count = valid.shape
        scores = logits.softmax(-1)[:, :-1].reshape(batch, count, self.classes) * (valid > 0)[..., None]
        scores = (scores * (scores > self.settings.score_threshold)).flatten(1)
        best, index = scores.topk(min(CANDIDATES * self.settings.max_detections, count * self.classes), dim=1)
        labels, roi = index % self.classes, index // self.classes
        chosen = deltas.reshape(batch, count * self.classes, 4).gather(1, index[..., None].expand(-1, -1, 4))
        boxes = clip(decode(chosen, proposals.gather(1, roi[..., None].expand(-1, -1, 4)), HEAD_STD), sizes)
        kept = best * nms_mask(boxes, best, labels, self.settings.nms_threshold)
        best, order = kept.topk(min(self.settings.max_detections, kept.shape[1]), dim=1)
        boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
        if self.settings.refine_boxes and not training:
            # iterative bounding box regression, scores and NMS as they were; the teacher's would drift
            _, deltas = self.box_head(features, boxes)
            own = deltas.gather(1, labels.reshape(-1, 1, 1).expand(-1, -1, 4)).reshape(boxes.shape)
            boxes = clip(decode(own, boxes, HEAD_STD), sizes)
        return boxes, best, labels

    def losses(self, views: Views) -> dict[str, Tensor]:
        """The four losses of Faster R-CNN on labelled views, each of weight 1."""
        return self.losses_and_rois(views)[0]

    def losses_and_rois(self, views: Views) -> tuple[dict[str, Tensor], list[Tensor], RoIs]:
        """The losses, and the pyramid maps and sampled RoIs that they come from."""
        s, noise = self.settings, views.noise()
        features = self.features(views.images)
        with torch.no_grad():
            rpn = self.rpn(features)
        targets = rpn_targets(rpn.anchors, views.sizes, views.boxes, s.rpn_batch, noise)
        losses = rpn_loss(*self.rpn_at(features, targets.anchors), targets)
        proposals, scores = self.proposals(rpn, views.sizes, training=True)
        rois = sample_rois(proposals, scores > 0, views.boxes, views.labels, s.roi_batch, self.classes, noise)
        logits, deltas = self.box_head(features, rois.boxes)
        losses |= {"cls": classification_loss(logits, rois), "box": regression_loss(deltas, rois)}
        return losses, features, rois

    def _rpn_heads(self, hidden: Tensor) -> Tensor:
        """Objectness and deltas [..., 15] of the three anchors of cells [..., C]."""
        heads = (self.rpn_logits, self.rpn_deltas)
        bias = [h.bias for h in heads if h.bias is not None]
        return F.linear(hidden, torch.cat([h.weight.flatten(1) for h in heads]), torch.cat(bias))
