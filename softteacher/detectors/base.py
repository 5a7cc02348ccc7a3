"""What every detector is: a backbone with a feature pyramid, losses on labelled views, detections of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from softteacher.config import DetectorSettings
from softteacher.data.loader import Views
from softteacher.detections import Detections
from softteacher.detectors.layers import MapConv

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BACKBONE_STRIDES = (4, 8, 16, 32)


class Detector(nn.Module):
    """A detector on a feature pyramid; `losses` and `detect` are its kind's own.

    Args:
        backbone: four stages in a row, their outputs of strides 4, 8, 16, 32.
        channels: the channels of these outputs.
        classes: number of classes C.
        settings: widths, numbers of proposals, thresholds.
        extra: makes the levels above stride 32.

    Attributes:
        class_heads: names of the modules with an output row per class; `init_from` leaves them fresh where the
            classes are others.
    """

    class_heads: tuple[str, ...]

    def __init__(
        self,
        backbone: nn.ModuleList,
        channels: list[int],
        classes: int,
        settings: DetectorSettings,
        extra: nn.Module,
    ) -> None:
        super().__init__()
        self.settings, self.classes = settings, classes
        self.precision = torch.float32
        self.backbone = backbone
        self.first_level = BACKBONE_STRIDES.index(settings.finest_stride)
        self.fpn = FeaturePyramidNetwork(channels[self.first_level :], settings.fpn_channels, extra_blocks=extra)
        for block in self.fpn.layer_blocks:
            block[0] = MapConv(block[0])
        self.mean, self.std = nn.Buffer(_channels(MEAN), persistent=False), nn.Buffer(_channels(STD), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Pyramid maps [B, channels, H / stride, W / stride], finest first, of uint8 RGB images [B, 3, H, W]."""
        x = (images.float() - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        with self.autocast(images):
            maps = {}
            for n, stage in enumerate(self.backbone):
                x = stage(x)
                if n >= self.first_level:
                    maps[str(n)] = x
            return list(self.fpn(maps).values())

    def losses(self, views: Views) -> dict[str, Tensor]:
        """The loss terms on labelled views, each of weight 1."""
        raise NotImplementedError

    def detect(self, features: list[Tensor], sizes: Tensor, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Detections after class-wise NMS; K is `max_detections`, or less where there are fewer candidates.

        Args:
            features: pyramid maps.
            sizes: [B, 2] (height, width) of the images before padding.
            training: with the number of candidates of training (the teacher's pseudo boxes).

        Returns:
            Boxes [B, K, 4], scores [B, K], labels [B, K] int64, best first; a score of 0 marks an unused place.
        """
        raise NotImplementedError

    def forward(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Detect objects: uint8 RGB [B, 3, H, W] and [B, 2] sizes in, one `Detections` per image out."""
        return self.detections(self.features(images), sizes)

    def detections(self, features: list[Tensor], sizes: Tensor) -> list[Detections]:
        """What `detect` finds at test, without its unused places: one `Detections` an image."""
        boxes, scores, labels = self.detect(features, sizes)
        return [Detections(b, s, n)[s > 0] for b, s, n in zip(boxes, scores, labels, strict=True)]

    def autocast(self, x: Tensor) -> torch.autocast:
        """The mixed precision of the networks, where `x` is."""
        return torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32)


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).reshape(3, 1, 1)
