"""`build(settings, classes)`: the detector of a settings tree, with backbone weights from a name, a path or S3."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from softteacher import storage
from softteacher.config import DetectorSettings
from softteacher.console import say
from softteacher.detectors.base import Detector
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.detectors.fcos import FCOS
from softteacher.detectors.layers import fold_frozen_norms
from softteacher.errors import UserError


def build(settings: DetectorSettings, classes: int, load_backbone: bool = True) -> Detector:
    """A detector with fresh heads.

    Args:
        settings: architecture and widths.
        classes: number of classes.
        load_backbone: load `backbone_weights`; not needed when all weights are loaded afterwards.

    Raises:
        UserError: the weights are missing, or don't fit the architecture.
    """
    pretrained = settings.backbone_weights is not None
    if settings.norm == "frozen_batch" and not pretrained:
        raise UserError(
            "detector.backbone_weights: none given, but detector.norm=frozen_batch can't learn without; give a "
            "torchvision name (IMAGENET1K_V1), a path or an s3:// URI, or set detector.norm=auto"
        )
    kind, name = settings.name.removesuffix("_fpn").split("_", 1)
    frozen_norm = settings.norm == "frozen_batch" or (settings.norm == "auto" and pretrained)
    norm: Any = FrozenBatchNorm2d if frozen_norm else _group_norm
    trunk: Any
    if name == "tiny":
        # small enough to learn simple scenes in minutes without pretraining
        channels = [32, 64, 96, 128]
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), _group_norm(16), nn.ReLU())
        blocks = [nn.Sequential(_Block(a, b), _Block(b, b, 1)) for a, b in itertools.pairwise([16, *channels])]
        trunk = stages = nn.ModuleList([nn.Sequential(stem, blocks[0]), *blocks[1:]])
    elif name == "mobilenet_v2":
        trunk = torchvision.models.mobilenet_v2(norm_layer=norm).features
        stages = nn.ModuleList([trunk[:4], trunk[4:7], trunk[7:14], trunk[14:]])
        channels = [24, 32, 96, 1280]
    else:
        trunk = getattr(torchvision.models, name)(norm_layer=norm)
        del trunk.fc
        stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, trunk.layer1)
        stages = nn.ModuleList([stem, trunk.layer2, trunk.layer3, trunk.layer4])
        channels = [c * (4 if name in {"resnet50", "resnet101"} else 1) for c in (64, 128, 256, 512)]
    if load_backbone and settings.backbone_weights is not None:
        _load(trunk, name, settings.backbone_weights)
    elif load_backbone and name != "tiny":
        say(f"warning: no detector.backbone_weights: {settings.name} learns from nothing, which takes far more images")
    fold_frozen_norms(stages)
    for stage in stages[: settings.frozen_stages if pretrained else 0]:
        stage.requires_grad_(False)
    return (FCOS if kind == "fcos" else FasterRCNN)(stages, channels, classes, settings)


def _load(trunk: nn.Module, name: str, weights: str) -> None:
    """Fill the trunk from a torchvision name, or from a state dict with torchvision's keys on disk or S3."""
    where = f"detector.backbone_weights={weights}"
    if "/" in weights or weights.endswith((".pth", ".pt")):
        with storage.local_input(weights) as path:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as e:  # a file that is no state dict can make the unpickler raise anything
                raise UserError(
                    f"{where}: no readable state dict ({type(e).__name__}); save model.state_dict() by torch.save"
                ) from None
    elif name == "tiny":
        raise UserError(f"{where}: the tiny backbone has no torchvision weights; leave it none or give a path")
    else:
        try:
            state = torchvision.models.get_model_weights(name)[weights].get_state_dict(progress=True, check_hash=True)
        except KeyError:
            known = ", ".join(torchvision.models.get_model_weights(name).__members__)
            raise UserError(f"{where}: {name} has {known}; name one, or give a path or an s3:// URI") from None
        except (OSError, RuntimeError) as e:
            raise UserError(f"{where}: can't be downloaded ({e}); give a local path or an s3:// URI") from None
    if not isinstance(state, dict):
        raise UserError(f"{where}: no state dict in it; save model.state_dict()")
    state = {
        k.removeprefix("module.").removeprefix("backbone.").removeprefix("features."): v
        for k, v in state.items()
        if isinstance(k, str) and isinstance(v, Tensor)
    }
    own = trunk.state_dict()
    odd = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if odd:
        raise UserError(
            f"{where}: does not fit {name}: {len(odd)} tensors are missing or of another shape, first {odd[0]}"
        )
    trunk.load_state_dict({k: state[k] for k in own})


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            _group_norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            _group_norm(outputs),
        )
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), _group_norm(outputs))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))
