"""Backbones: torchvision's classification networks and a tiny one of our own, cut into four stages."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, Permute, StochasticDepth

from softteacher import storage
from softteacher.config import DetectorSettings
from softteacher.console import say
from softteacher.detectors.layers import fold_frozen_norms
from softteacher.errors import UserError


def build_backbone(settings: DetectorSettings, load: bool = True) -> tuple[nn.ModuleList, list[int]]:
    """The backbone of a detector, `frozen_stages` of it frozen.

    Args:
        settings: `name` as `<kind of detector>_<backbone>_fpn`, weights, norm.
        load: load `backbone_weights`.

    Returns:
        Four stages in a row, [B, 3, H, W] to maps of strides 4, 8, 16, 32, and the channels of these.

    Raises:
        UserError: the weights are missing, or don't fit the architecture.
    """
    pretrained = settings.backbone_weights is not None or settings.init_from is not None
    if settings.norm == "frozen_batch" and not pretrained:
        raise UserError(
            "detector.backbone_weights: none given, but detector.norm=frozen_batch can't learn without; give a "
            "torchvision name (IMAGENET1K_V1), a path or an s3:// URI, or set detector.norm=auto"
        )
    name = settings.name.split("_", 1)[1].removesuffix("_fpn")
    norm: Any = _group_norm
    if settings.norm == "frozen_batch" or (settings.norm == "auto" and pretrained):
        norm = functools.partial(FrozenBatchNorm2d, eps=1e-3 if name.startswith("mobilenet_v3") else 1e-5)
    trunk: Any
    if name == "tiny":
        # small enough to learn simple scenes in minutes without pretraining
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), _group_norm(16), nn.ReLU())
        widths = itertools.pairwise([16, 32, 64, 96, 128])
        blocks = [nn.Sequential(_Block(a, b), _Block(b, b, 1)) for a, b in widths]
        trunk = stages = nn.ModuleList([nn.Sequential(stem, blocks[0]), *blocks[1:]])
    elif name.startswith("swin"):
        trunk = getattr(torchvision.models, name)().features
        for module in trunk.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.0  # the teacher must not be noisy, and a run that goes on must draw what it would have
        maps = [nn.Sequential(Permute([0, 2, 3, 1]), *trunk[n : n + 2], Permute([0, 3, 1, 2])) for n in (0, 2, 4, 6)]
        stages = nn.ModuleList([maps[0][1:], *maps[1:]])  # the patch embedding takes [B, 3, H, W]
    elif name.startswith("mobilenet"):
        trunk = getattr(torchvision.models, name)(norm_layer=norm).features
        # those of stride 4, 8, 16 and 32, as torchvision's own detectors find them
        starts = [n for n, block in enumerate(trunk) if getattr(block, "_is_cn", False)]
        stages = nn.ModuleList([trunk[a:b] for a, b in itertools.pairwise([0, *starts[1:], len(trunk)])])
    else:
        trunk = getattr(torchvision.models, name)(norm_layer=norm)
        del trunk.fc
        stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, trunk.layer1)
        stages = nn.ModuleList([stem, trunk.layer2, trunk.layer3, trunk.layer4])
    if load and settings.backbone_weights is not None:
        _load(trunk, name, settings.backbone_weights)
    elif load and name != "tiny" and not pretrained:
        say(f"warning: no detector.backbone_weights: {settings.name} learns from nothing, which takes far more images")
    fold_frozen_norms(stages)
    for stage in stages[: settings.frozen_stages if pretrained else 0]:
        stage.requires_grad_(False)
    channels, x = [], torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
            channels.append(x.shape[1])
    return stages, channels


def read_state(uri: str, where: str) -> dict[str, Tensor]:
    """The tensors of a state dict on disk or S3; nothing in the file is executed.

    Args:
        uri: the file, local or `s3://`.
        where: what errors call it.

    Raises:
        UserError: there is no such file, or no state dict in it.
    """
    with storage.local_input(uri) as path:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # a file that is no state dict can make the unpickler raise anything
            raise UserError(
                f"{where}: no readable state dict ({type(e).__name__}); save model.state_dict() by torch.save"
            ) from None
    if not isinstance(state, dict):
        raise UserError(f"{where}: no state dict in it; save model.state_dict()")
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _load(trunk: nn.Module, name: str, weights: str) -> None:
    """Fill the trunk from a torchvision name, or from a state dict with torchvision's keys on disk or S3."""
    where = f"detector.backbone_weights={weights}"
    if "/" in weights or weights.endswith((".pth", ".pt")):
        state = read_state(weights, where)
    elif name == "tiny":
        raise UserError(f"{where}: fasterrcnn_tiny_fpn has no torchvision weights; leave it none or give a path")
    else:
        try:
            state = torchvision.models.get_model_weights(name)[weights].get_state_dict(progress=True, check_hash=True)
        except KeyError:
            known = ", ".join(torchvision.models.get_model_weights(name).__members__)
            raise UserError(f"{where}: {name} has {known}; name one, or give a path or an s3:// URI") from None
        except (OSError, RuntimeError) as e:
            raise UserError(f"{where}: can't be downloaded ({e}); give a local path or an s3:// URI") from None
    state = {k.removeprefix("module.").removeprefix("backbone.").removeprefix("features."): v for k, v in state.items()}
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
