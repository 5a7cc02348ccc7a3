"""`build(settings, classes)`: the detector of a settings tree, fresh or from another detector's weights."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor
from torchvision.models.convnext import LayerNorm2d

from softteacher import storage
from softteacher.config import DetectorSettings
from softteacher.console import say
from softteacher.detectors.backbones import build_backbone, read_state
from softteacher.detectors.base import Detector
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.detectors.fcos import FCOS
from softteacher.detectors.mask_rcnn import MaskRCNN
from softteacher.errors import UserError

LISTED = 10  # names in the line about fresh tensors


def build(
    settings: DetectorSettings, classes: int, load_backbone: bool = True, names: Sequence[str] | None = None
) -> Detector:
    """A detector with fresh heads, or with what it can take over from the one that `init_from` names.

    Args:
        settings: architecture and widths.
        classes: number of classes.
        load_backbone: load `backbone_weights` and `init_from`; not needed when all weights are loaded afterwards.
        names: of the classes, in label order: the heads of a model folder that has others stay fresh.

    Raises:
        UserError: the weights are missing, or don't fit the architecture.
    """
    stages, channels = build_backbone(settings, load_backbone)
    kinds = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN, "fcos": FCOS}
    detector = kinds[settings.name.split("_", 1)[0]](stages, channels, classes, settings)
    if "_swin_" in settings.name:
        # its stages hand on sums of residuals, which nothing has normalised
        for block, width in zip(detector.fpn.inner_blocks, channels[detector.first_level :], strict=True):
            block.insert(0, LayerNorm2d(width))
    if load_backbone and settings.init_from is not None:
        _start_from(detector, settings.init_from, names)
    return detector


def _start_from(detector: Detector, source: str, names: Sequence[str] | None) -> None:
    """Take over every tensor of the same name and shape; say which stay fresh, as heads of other classes do."""
    where = f"detector.init_from={source}"
    is_file = source.endswith((".pt", ".pth"))
    state, own = read_state(source if is_file else storage.join(source, "teacher.pt"), where), detector.state_dict()
    there = None if is_file else _classes(source, where)
    others = names is not None and there is not None and list(names) != there
    taken = {
        k: state[k]
        for k, v in own.items()
        if k in state and state[k].shape == v.shape and not (others and k.split(".")[0] in detector.class_heads)
    }
    unsure = names is not None and there is None and any(k.split(".")[0] in detector.class_heads for k in taken)
    name = detector.settings.name
    if not taken:
        raise UserError(f"{where}: has no tensor of {name}; give a model folder, or a state dict, of this architecture")
    fresh = [k for k in own if k not in taken]
    learning = {k for k, p in detector.named_parameters() if p.requires_grad}
    stuck = [k for k in fresh if k not in learning]
    if stuck and detector.settings.backbone_weights is None:
        raise UserError(
            f"{where}: has no {stuck[0]} of {name}, which is frozen and would never learn; set detector.norm=group and "
            "detector.frozen_stages=0, or give detector.backbone_weights too"
        )
    detector.load_state_dict(taken, strict=False)
    there_too = {k: f", there {_shape(state[k])}" for k in fresh if k in state and state[k].shape != own[k].shape}
    shown = [f"{k} {_shape(own[k])}{there_too.get(k, '')}" for k in fresh[:LISTED]]
    more = f"; and {len(fresh) - LISTED} more" if len(fresh) > LISTED else ""
    say(
        f"detector: {len(taken)} of {len(own)} tensors from {source}"
        + (f"; fresh are: {'; '.join(shown)}{more}" if fresh else "")
        + (f"; the classes there are {', '.join(there or ())[:200]}" if others else "")
        + ("; it does not tell its classes: they are taken for the same" if unsure else "")
    )


def _classes(source: str, where: str) -> list[str] | None:
    """The class names of a model folder, in label order; none if it doesn't say."""
    try:
        return [str(row["name"]) for row in json.loads(storage.read_bytes(storage.join(source, "classes.json")))]
    except storage.MissingFile:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: classes.json is not ours; copy the whole model folder again") from None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
