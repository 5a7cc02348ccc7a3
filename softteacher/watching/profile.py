"""`TrafficProfile`: what a detector answers, as four small histograms that can be added up. No image is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from softteacher import storage
from softteacher.detections import Detections
from softteacher.errors import UserError

if TYPE_CHECKING:
    from softteacher.data.coco import CocoDataset

FORMAT = "softteacher-traffic-1"
FILE = "profile.json"  # of the reference, in an onnx folder
MIN_SCORE = 0.3
# the lower end of each bin but the first, whose values lie below
BINS: dict[str, np.ndarray] = {
    "score": np.arange(1, 10) / 10,
    "size": 2.0 ** np.arange(-5.5, 0, 0.5),
    "count": np.array([1, 2, 3, 4, 5, 7, 10, 15, 25, 50]),
}
HISTOGRAMS = ("score", "class", "size", "count")


class NoProfile(UserError):
    """A file that isn't a traffic profile, or one of other bins."""


@dataclass
class TrafficProfile:
    """Histograms of a detector's answers; of the same size for ten images as for ten million.

    Attributes:
        classes: C names, in label order.
        name: of the model, where it is deployed.
        version: likewise.
        min_score: detections below it count in the histogram of scores only.
        start: UTC time of the first image, ISO 8601; empty for a reference.
        end: of the last one.
        images: how many were looked at.
        histograms: int64 counts: `score` [10] of all detections; of those from `min_score` on `class` [C], `size` [12]
            (the square root of the box's share of the image; half octaves) and `count` [11] (how many in an image).

    Example:
        >>> profile = TrafficProfile(("cat", "dog"))
        >>> profile.observe(Detections(np.array([[0, 0, 50, 50]]), np.array([.9]), np.array([1])), (100, 100))
        >>> (profile + profile).histograms["class"].tolist()
        [0, 2]
    """

    classes: tuple[str, ...]
    name: str = ""
    version: str = ""
    min_score: float = MIN_SCORE
    start: str = ""
    end: str = ""
    images: int = 0
    histograms: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for histogram in HISTOGRAMS:
            self.histograms.setdefault(histogram, np.zeros(self._bins(histogram), np.int64))

    def _bins(self, histogram: str) -> int:
        return len(self.classes) if histogram == "class" else len(BINS[histogram]) + 1

    def observe(self, detections: Detections, size: tuple[int, int], time: str = "") -> None:
        """Count the answer to one image.

        Args:
            detections: all of them, in pixels of the image.
            size: (width, height) of the image.
            time: UTC, ISO 8601.

        Raises:
            UserError: a label is none of the classes; nothing is counted then.
        """
        found = detections.numpy()
        scores = np.nan_to_num(np.asarray(found.scores, np.float64))
        sure = scores >= self.min_score
        labels = np.asarray(found.labels, np.int64)[sure]
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(f"a detection has label {labels.max()}, but there are {len(self.classes)} classes")
        boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4)[sure]
        sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
        values = {
            "score": scores,
            "size": np.sqrt(sides.prod(1) / max(1, size[0] * size[1])),
            "count": np.array([sure.sum()]),
        }
        for name, x in values.items():
            self.histograms[name] += np.bincount(
                np.searchsorted(BINS[name], x, side="right"), minlength=self._bins(name)
            )
        self.histograms["class"] += np.bincount(labels, minlength=len(self.classes))
        self.images += 1
        if time:
            self.start, self.end = min(self.start or time, time), max(self.end, time)

    def __add__(self, other: TrafficProfile) -> TrafficProfile:
        """Both together.

        Raises:
            UserError: they are of different classes, or have different `min_score`.
        """
        if self.classes != other.classes or self.min_score != other.min_score:
            what = "classes" if self.classes != other.classes else f"min_score ({self.min_score}, {other.min_score})"
            who = f"{self.name or 'traffic'} {self.version}".strip()
            raise UserError(f"{who}: profiles of different {what} can't be added; choose one --version, or a later day")
        return TrafficProfile(
            classes=self.classes,
            name=self.name if self.name == other.name else "",
            version=self.version if self.version == other.version else "",
            min_score=self.min_score,
            start=min(filter(None, (self.start, other.start)), default=""),
            end=max(self.end, other.end),
            images=self.images + other.images,
            histograms={name: self.histograms[name] + other.histograms[name] for name in HISTOGRAMS},
        )

    def write(self, uri: str) -> None:
        """Write it as JSON, local or `s3://`.

        Raises:
            UserError: it can't be written.
        """
        tree: dict[str, Any] = {"format": FORMAT, **vars(self), "classes": list(self.classes)}
        tree["histograms"] = {name: self.histograms[name].tolist() for name in HISTOGRAMS}
        tree["bins"] = {name: edges.tolist() for name, edges in BINS.items()}
        storage.write_bytes(uri, json.dumps(tree).encode())

    @staticmethod
    def read(uri: str) -> TrafficProfile:
        """Read what `write` wrote.

        Raises:
            MissingFile: there is none.
            NoProfile: it is something else.
            UserError: it can't be read.
        """
        data = storage.read_bytes(uri)
        try:
            tree = json.loads(data)
            if tree["format"] != FORMAT or any(tree["bins"][k] != v.tolist() for k, v in BINS.items()):
                raise ValueError("other bins")
            profile = TrafficProfile(
                classes=tuple(str(c) for c in tree["classes"]),
                min_score=float(tree["min_score"]),
                images=int(tree["images"]),
                histograms={name: np.array(tree["histograms"][name], np.int64) for name in HISTOGRAMS},
                **{key: str(tree[key]) for key in ("name", "version", "start", "end")},
            )
            for name, histogram in profile.histograms.items():
                if histogram.shape != (profile._bins(name),) or (histogram < 0).any():
                    raise ValueError(f"histogram {name}")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            raise NoProfile(f"{uri}: no traffic profile of this version of softteacher; give another file") from None
        return profile


def reference_profile(dataset: CocoDataset, found: Mapping[int, Detections]) -> TrafficProfile:
    """The profile that live traffic is compared with: the detector's own answers on the validation set.

    Args:
        dataset: the validation set.
        found: image id -> detections in pixels of the original image, one for each image of the set.
    """
    profile = TrafficProfile(tuple(dataset.classes))
    for image in dataset.images:
        profile.observe(found[image.id], (image.width, image.height))
    return profile
