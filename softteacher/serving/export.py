"""Step 4: a model folder becomes one ONNX file, and the proof that it answers as the PyTorch detector does."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from softteacher import storage
from softteacher.console import say
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset
from softteacher.data.images import PAD, inference_size
from softteacher.data.loader import STRIDE
from softteacher.detections import Detections
from softteacher.detectors.base import Detector
from softteacher.detectors.mask_rcnn import MaskRCNN
from softteacher.errors import UserError
from softteacher.model_folder import ModelFolder, Weights, sha256
from softteacher.serving.onnx_runtime import OnnxDetector, evaluate_onnx, score_canvases
from softteacher.serving.outputs import MASKS, OUTPUTS, to_detections

OPSET = 20
MAX_BATCH = 64
SMOKE_IMAGES = 4
SCORE = 0.05  # detections under it are not compared
MIN_MATCHED = 0.95


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


def export(model: str, out: str, *, weights: Weights = "teacher") -> dict[str, Any]:
    """Export a trained detector and compare it with PyTorch on real validation images.

    Args:
        model: model folder, local or `s3://`.
        out: onnx folder: `model.onnx`, `parity.json`, `smoke.npz` (images with ONNX Runtime's answers, for the smoke
            test of a deployment), `provenance.json`, `validation.json`.
        weights: whose weights.

    Returns:
        What `parity.json` says.

    Raises:
        UserError: the folder is torn, the graph and PyTorch disagree, or the export loses more AP than
            `export.max_ap_loss`; nothing is written then.
    """
    with storage.local_input(model) as path, storage.output_folder(out) as folder:
        source = ModelFolder(path, model)
        validation = source.validation()
        size = source.settings.export.image_size or canvas_size(source, validation)
        served = ServedDetector(source.detector(weights), size).eval()
        say(f"export: {weights} of {model}, {size[1]} x {size[0]} pixels, opset {OPSET}")
        file = folder / "model.onnx"
        write_onnx(served, source, size, file)
        detector = OnnxDetector(file)
        samples = np.stack([detector.letterbox(read_image(validation, i)[0])[0] for i in _spread(validation)])
        parity: dict[str, Any] = {"weights": weights, "image_size": size, "opset": OPSET, "onnx_sha256": sha256(file)}
        for batch in (1, 4):
            found = parity[f"batch_{batch}"] = compare(served, detector, samples, batch)
            if found["matched"] < MIN_MATCHED * found["boxes"]:
                raise UserError(
                    f"{model}: at batch {batch} the ONNX file finds {found['matched']} of PyTorch's {found['boxes']} "
                    "boxes; not exported. Other versions of torch and onnxruntime may help"
                )
        parity["ap"] = {
            "onnxruntime": evaluate_onnx(file, validation)["AP"],
            "pytorch": score_canvases(served.run, detector, validation, "pytorch")["AP"],
        }
        parity["validation_fingerprint"] = validation.fingerprint()
        loss = parity["ap"]["pytorch"] - parity["ap"]["onnxruntime"]
        if loss > source.settings.export.max_ap_loss:
            raise UserError(
                f"{model}: the ONNX file loses {loss:.4f} AP, {source.settings.export.max_ap_loss} allowed "
                "(export.max_ap_loss); not exported"
            )
        smoke = samples[np.arange(SMOKE_IMAGES) % len(samples)]
        np.savez_compressed(folder / "smoke.npz", allow_pickle=False, images=smoke, **detector.run(smoke))
        (folder / "parity.json").write_text(json.dumps(parity, indent=1))
        source.copy_provenance(folder)
    ap = parity["ap"]
    say(f"export: AP {ap['onnxruntime']:.4f} on ONNX Runtime, {ap['pytorch']:.4f} on PyTorch -> {out}")
    return parity


def canvas_size(source: ModelFolder, validation: CocoDataset) -> tuple[int, int]:
    """Height and width, divisible by 32, that hold every validation image at its test size."""
    data = source.settings.data
    sizes = [inference_size(i.width, i.height, data.short_side, data.max_long_side) for i in validation.images]
    width, height = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
    return height, width


def write_onnx(served: ServedDetector, source: ModelFolder, size: tuple[int, int], file: Path) -> None:
    """Write and check the ONNX file; the batch dimension is dynamic, classes and preprocessing are its metadata."""
    import onnx

    example = torch.full((2, *size, 3), PAD[0], dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _quiet():
        program = torch.onnx.export(
            served, (example,), dynamo=True, opset_version=OPSET, input_names=["images"],
            output_names=list(served.outputs), dynamic_shapes={"images": {0: batch}}, verbose=False,
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
        "max_detections": str(source.settings.detector.max_detections),
    }
    onnx.helper.set_model_props(graph, facts)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(file))


def compare(served: ServedDetector, detector: OnnxDetector, samples: np.ndarray, batch: int) -> dict[str, Any]:
    """ONNX Runtime against PyTorch on the same canvases.

    Args:
        served: the PyTorch side.
        detector: the ONNX side.
        samples: uint8 [N, H, W, 3].
        batch: images per call.

    Returns:
        `boxes` above score .05 on the PyTorch side, how many of them are `matched` (same class, IoU > .5), the largest
        `score_difference`, `box_difference` (pixels) and, with masks, `mask_difference` among the matched.
    """
    boxes, matched, score_difference, box_difference, mask_difference = 0, 0, 0.0, 0.0, 0.0
    for start in range(0, len(samples), batch):
        chunk = samples[start : start + batch]
        ours, theirs = served.run(chunk), detector.run(chunk)
        for n in range(len(chunk)):
            a, b = (to_detections(x, n, (1, 1), (served.size[1], served.size[0])) for x in (ours, theirs))
            a = a[a.scores > SCORE]
            boxes += len(a)
            for k, (box, score, label) in enumerate(zip(a.boxes, a.scores, a.labels, strict=True)):
                same: Detections = b[b.labels == label]
                if not len(same):
                    continue
                iou = box_iou(torch.from_numpy(box[None]), torch.from_numpy(same.boxes))[0]
                best = int(iou.argmax())
                if iou[best] > 0.5:
                    matched += 1
                    score_difference = max(score_difference, abs(float(score - same.scores[best])))
                    box_difference = max(box_difference, float(np.abs(box - same.boxes[best]).max()))
                    if a.masks is not None:
                        mask_difference = max(mask_difference, float(np.abs(a.masks[k] - same.masks[best]).max()))
    return {
        "images": len(samples),
        "boxes": boxes,
        "matched": matched,
        "score_difference": score_difference,
        "box_difference": box_difference,
        **({"mask_difference": mask_difference} if MASKS in served.outputs else {}),
    }


def _spread(validation: CocoDataset, count: int = 16) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, len(validation) - 1, count)})


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
