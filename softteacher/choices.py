"""The choices that the command line offers, and their checks. Imports nothing slow: `--help` comes at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from softteacher.errors import UserError

MethodName = Literal["soft_teacher", "mean_teacher", "stac", "supervised"]
Weights = Literal["teacher", "student"]
EngineName = Literal["openvino-fp32", "openvino-bf16", "openvino-int8", "onnxruntime-int8"]
ServedEngine = Literal["onnxruntime-fp32", EngineName]
Backend = Literal["python", "onnxruntime", "openvino"]
Runner = Literal["subprocess", "docker"]
Format = Literal["table", "json", "coco", "csv"]


@dataclass(frozen=True)
class Bounds:
    """What a new model must keep to at the gate.

    Attributes:
        delta: AP by which it must be better; a negative one tolerates a loss.
        max_class_drop: AP that a class may fall by. Only a fall counts that is no chance: the class is on at least ten
            images, and its interval lies under zero. 1: any.
        max_latency_ratio: its latency over the champion's.
        require_significant: the interval of the gain must lie over zero, and be of ten images with boxes or more.

    Raises:
        UserError: one is infinite, or no number: a comparison with that says nothing.
    """

    delta: float = 0.0
    max_class_drop: float = 0.05
    max_latency_ratio: float = 1.5
    require_significant: bool = False

    def __post_init__(self) -> None:
        for key in ("delta", "max_class_drop", "max_latency_ratio"):
            if not math.isfinite(value := getattr(self, key)):
                raise UserError(f"--{key.replace('_', '-')} {value}: must be a finite number")


def check_percent(percent: float, unlabeled: str | None) -> None:
    """Whether a share can be labelled.

    Raises:
        UserError: it can't, or no image would be left without labels.
    """
    if not 0 < percent <= 100:
        raise UserError(f"--percent {percent:g}: must be more than 0 and at most 100, e.g. 10")
    if percent == 100 and not unlabeled:
        raise UserError("--percent 100: leaves no unlabelled image; give others with --unlabeled, or less, e.g. 10")


def check_name(name: str) -> None:
    """Whether a model can be served under a name.

    Raises:
        UserError: it can't.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"--name {name}: only letters, digits, - and _ make a model's name")
    if name.endswith(("-candidate", "-canary")):
        raise UserError(f"--name {name}: names with that ending are taken, for models on trial; choose another")
