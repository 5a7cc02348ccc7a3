"""The exported detector on ONNX Runtime: the reference that every server's answer is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from softteacher.console import track
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset
from softteacher.data.images import letterbox
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.evaluation.metrics import coco_metrics, coco_results
from softteacher.processors import engine_threads
from softteacher.serving import engines
from softteacher.serving.outputs import to_detections


class OnnxDetector:
    """An ONNX file of `softteacher export` with what its metadata says.

    Args:
        path: local path of `model.onnx`.

    Attributes:
        run: on ONNX Runtime in fp32, uint8 [B, H, W, 3] to the raw outputs; see `softteacher.serving.graph`.
        categories: (id, name) in label order.
        image_size: (height, width) of the canvas.
        finest_map: the tensor that the finest level of the pyramid is made from.

    Raises:
        UserError: it can't be loaded, or is not ours.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self.run = engines.load(path, threads=engine_threads())
            metadata = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
            self.categories = [(int(c["id"]), str(c["name"])) for c in json.loads(metadata["classes"])]
            how = json.loads(metadata["preprocessing"])
            self.image_size: tuple[int, int] = (int(how["image_size"][0]), int(how["image_size"][1]))
            self.finest_map: str = metadata.get("finest_map", "")
            self.short_side, self.long_side = int(how["short_side"]), int(how["long_side"])
        except Exception as e:  # ONNX Runtime has a dozen exception classes of its own
            raise UserError(f"{path}: not an ONNX file of `softteacher export` ({str(e).splitlines()[0]})") from None

    def letterbox(self, image: Image.Image) -> tuple[np.ndarray, tuple[float, float]]:
        """The canvas that the graph wants, and the scale; see `softteacher.data.images.letterbox`."""
        return letterbox(image, self.image_size, self.short_side, self.long_side)


def score_canvases(
    run: Callable[[np.ndarray], dict[str, np.ndarray]], detector: OnnxDetector, dataset: CocoDataset, title: str
) -> dict[str, Any]:
    """COCO metrics of whatever answers as the graph does, see `detect_canvases`."""
    return coco_metrics(dataset, coco_results(dataset, detect_canvases(run, detector, dataset, title)))


def detect_canvases(
    run: Callable[[np.ndarray], dict[str, np.ndarray]], detector: OnnxDetector, dataset: CocoDataset, title: str
) -> dict[int, Detections]:
    """What it finds, by image id, asked image by image on the graph's own canvas."""
    found = {}
    for index, record in track(enumerate(dataset.images), title, len(dataset)):
        image = read_image(dataset, index)[0]
        canvas, scale = detector.letterbox(image)
        found[record.id] = to_detections(run(canvas[None]), 0, scale, image.size)
    return found
