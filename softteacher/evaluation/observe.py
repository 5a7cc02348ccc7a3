"""One pass of a detector that gives more than boxes: how far box jittering spreads them, and what the image is like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softteacher.config import Settings
from softteacher.detections import Detections
from softteacher.detectors.base import Detector
from softteacher.methods import build_method


@dataclass(kw_only=True)
class Observed(Detections):
    """Detections of one image, all numpy.

    Attributes:
        variance: [N] box regression variance (paper, Eq. 6-8).
        feature: [C] the finest pyramid map, averaged over the image.
    """

    variance: np.ndarray
    feature: np.ndarray


class Observer(nn.Module):
    """Called like a detector, gives `Observed`. Every image is jittered by the same noise, whatever its batch.

    Args:
        detector: any; a supervised one is looked at as Soft Teacher would.
        settings: of the model: method, seed.
        classes: C names.
    """

    def __init__(self, detector: Detector, settings: Settings, classes: list[str]) -> None:
        super().__init__()
        self.detector, self.seed = detector, settings.training.seed
        # mixup is of training only, and refused where masks are
        method = settings.method.model_copy(update={"name": "soft_teacher", "mixup": 0.0})
        settings, unknown = settings.model_copy(update={"method": method}), dict.fromkeys(classes, 0.0)
        # which of the methods has the right `box_variance` depends on the kind of detector
        self.method: Any = build_method(settings, detector, detector, unknown)

    def forward(self, images: Tensor, sizes: Tensor) -> list[Observed]:
        """uint8 RGB [B, 3, H, W] and [B, 2] sizes (height, width) in, one `Observed` an image out."""
        features = self.detector.features(images)
        found = self.detector.detections(features, sizes)
        noise = [torch.Generator(images.device).manual_seed(self.seed) for _ in found]
        variances = self.method.box_variance(features, found, sizes, noise)
        share = sizes / torch.tensor(images.shape[2:], device=sizes.device)  # the rest of a map is padding
        out = []
        for d, variance, finest, part in zip(found, variances, features[0].float(), share.tolist(), strict=True):
            height, width = (max(1, round(p * side)) for p, side in zip(part, finest.shape[1:], strict=True))
            feature = finest[:, :height, :width].mean((1, 2)).cpu().numpy()
            out.append(Observed(**vars(d.numpy()), variance=variance.float().cpu().numpy(), feature=feature))
        return out
