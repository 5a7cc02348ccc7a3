"""What the gate decides, and the numbers that it goes by."""

from __future__ import annotations

from dataclasses import dataclass

from softteacher.choices import Bounds
from softteacher.evaluation.bootstrap import Difference
from softteacher.evaluation.metrics import Kind


@dataclass(frozen=True)
class ClassChange(Difference):
    """A class: its APs (`other` is the champion's) and the interval of the change.

    Attributes:
        name: of the class.
        images: that it is on.
        fallen: whether it fell by more than the bound.
    """

    name: str = ""
    images: int = 0
    fallen: bool = False


@dataclass(frozen=True)
class Comparison:
    """Both models on the same validation images.

    Attributes:
        version: of the champion.
        kind: AP of boxes (`bbox`) or, where both models answer masks, of masks (`segm`).
        gain: the APs over the classes that both know (`other` is the champion's), and the 95 % interval of the gain.
        classes: each of these classes.
        lost: what only the champion answers: names of classes, `masks of objects`.
        new: names of the classes that only the new model knows.
        latency_ms: the new model's median at batch 1 on ONNX Runtime.
        champion_latency_ms: the champion's, timed in turn.
        images: of the validation set.
        with_boxes: those of them with a box of a class that both know.
        resamples: of the bootstrap.
        seed: of its draw.
        bounds: that were asked for.
    """

    version: int
    kind: Kind
    gain: Difference
    classes: list[ClassChange]
    lost: list[str]
    new: list[str]
    latency_ms: float
    champion_latency_ms: float
    images: int
    with_boxes: int
    resamples: int
    seed: int
    bounds: Bounds


@dataclass(frozen=True)
class Decision:
    """Whether to deploy.

    Attributes:
        deploy: the answer.
        reason: one line.
        ap: the new model's AP on its validation set.
        champion_ap: the champion's AP on the same set; none if there is no champion.
        rejections: what speaks against it, each in words; none if `deploy`.
        comparison: the numbers; none if there is no champion.
        onnx_sha256: of the new model's file.
    """

    deploy: bool
    reason: str
    ap: float
    champion_ap: float | None
    rejections: tuple[str, ...] = ()
    comparison: Comparison | None = None
    onnx_sha256: str = ""

    def metrics(self) -> dict[str, float]:
        """`ap`; if there is a champion `champion_ap`, `gain`, `gain_low` and `gain_high`, and `latency_ratio`."""
        numbers: dict[str, float | None] = {"ap": self.ap, "champion_ap": self.champion_ap}
        if c := self.comparison:
            numbers |= {"gain": c.gain.change, "gain_low": c.gain.low, "gain_high": c.gain.high}
            numbers["latency_ratio"] = c.latency_ms / c.champion_latency_ms
        return {key: value for key, value in numbers.items() if value is not None}
