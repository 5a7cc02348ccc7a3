"""The graph that is exported, and how it is written as ONNX."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from softteacher.data.images import PAD
from softteacher.detectors.base import Detector
from softteacher.detectors.mask_rcnn import MaskRCNN
from softteacher.model_folder import ModelFolder
from softteacher.serving.outputs import MASKS, OUTPUTS

OPSET = 20
MAX_BATCH = 64
LATERALS = "detector.fpn.inner_blocks."  # the pyramid's weights on the backbone's maps, finest first


class ServedDetector(nn.Module):
    """The graph that is exported: uint8 NHWC canvases in, padded detections out.

    Outputs, as the field names them: `num_detections` [B, 1] int32, `detection_boxes` [B, K, 4] float32 (xyxy, canvas
    pixels), `detection_scores` [B, K] float32, `detection_classes` [B, K] int32 (index into the class list); of Mask
    R-CNN `detection_masks` [B, K, 28, 28] float32, too (probabilities in the frame of the box).
    """

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector, self.size = detector, size
        self.outputs = (*OUTPUTS, MASKS) if isinstance(detector, MaskRCNN) else OUTPUTS

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, H, W, 3] uint8 to the outputs."""
        sizes = torch.tensor([self.size], device=images.device).expand(images.shape[0], 2)
        features = self.detector.features(images.permute(0, 3, 1, 2))
        boxes, scores, labels = self.detector.detect(features, sizes)
        count = (scores > 0).sum(1, keepdim=True).to(torch.int32)
        found = count, boxes, scores, labels.to(torch.int32)
        if not isinstance(self.detector, MaskRCNN):
            return found
        masks = self.detector.mask_head(features, boxes, labels.flatten()).sigmoid()
        return *found, masks.unflatten(0, (-1, boxes.shape[1]))

    @torch.inference_mode()
    def run(self, canvases: np.ndarray) -> dict[str, np.ndarray]:
        """The same from and to numpy, by output name."""
        return {k: v.numpy() for k, v in zip(self.outputs, self(torch.from_numpy(canvases)), strict=True)}


def write_onnx(served: ServedDetector, source: ModelFolder, size: tuple[int, int], file: Path) -> None:
    """Write and check the ONNX file; the batch dimension is dynamic, classes and preprocessing are its metadata."""
    example = torch.full((2, *size, 3), PAD[0], dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _quiet():
        program = torch.onnx.export(
            served, (example,), dynamo=True, opset_version=OPSET, input_names=["images"],
            output_names=list(served.outputs), dynamic_shapes={"images": {0: batch}}, verbose=False,
            custom_translation_table={torch.ops.softteacher.nms_batch.default: _onnx_nms},
        )  # fmt: skip
    assert program is not None
    with tempfile.TemporaryDirectory() as scratch:
        program.save(f"{scratch}/raw.onnx", external_data=False)
        graph = onnx.load(f"{scratch}/raw.onnx")
    data = source.settings.data
    how = {"image_size": size, "short_side": data.short_side, "long_side": data.max_long_side, "pad": PAD}
    facts = {
        "classes": json.dumps([{"id": i, "name": n} for i, n in source.categories]),
        "preprocessing": json.dumps(how),
        # not always that of the settings: a small canvas has fewer places
        "max_detections": str(graph.graph.output[1].type.tensor_type.shape.dim[1].dim_value),
    }
    # where the pyramid takes its finest map from: the layers before may have to stay in fp32
    finest = (n.input[0] for n in graph.graph.node if n.op_type == "Conv" and n.input[1] == f"{LATERALS}0.0.weight")
    facts["finest_map"] = next(finest, "")
    onnx.helper.set_model_props(graph, facts)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(file))


def _onnx_nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """`detectors.boxes.nms_batch` in ONNX."""
    from onnxscript import opset20

    op: Any = opset20  # its annotations are for eager calls
    count = op.Shape(scores, start=1, end=2)
    limit = op.Constant(value_floats=[threshold])
    kept = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), count, limit)  # image, 0, box
    places = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(kept, start=0, end=1))
    nothing = op.ConstantOfShape(
        op.Shape(scores), value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0])
    )
    return op.Cast(op.ScatterND(nothing, places, ones), to=onnx.TensorProto.BOOL)


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints pages of progress and of warnings about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
