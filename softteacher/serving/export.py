"""Step 4: a model folder becomes one ONNX file, and the proof that it answers as the PyTorch detector does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.choices import Weights
from softteacher.console import say
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset
from softteacher.data.images import inference_size
from softteacher.data.loader import STRIDE
from softteacher.detections import match_boxes
from softteacher.device import set_threads
from softteacher.errors import UserError
from softteacher.evaluation.metrics import coco_metrics, coco_results
from softteacher.model_folder import ModelFolder, sha256
from softteacher.serving.graph import OPSET, ServedDetector, write_onnx
from softteacher.serving.onnx_runtime import OnnxDetector, detect_canvases, score_canvases
from softteacher.serving.outputs import MASKS, to_detections
from softteacher.serving.variants import measure_engines
from softteacher.watching.profile import reference_profile

SMOKE_IMAGES = 4
SCORE = 0.05  # detections under it are not compared
MIN_MATCHED = 0.95


def export(model: str, out: str, *, weights: Weights = "teacher", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Export a trained detector and compare it with PyTorch on real validation images.

    Args:
        model: model folder, local or `s3://`.
        out: onnx folder: `model.onnx`, `parity.json`, `smoke.npz` (images with ONNX Runtime's answers, for the smoke
            test of a deployment), `profile.json` (its answers to the validation set, for `watch`),
            `provenance.json`, `validation.json`; `model.int8.onnx` where `export.engines` asks for int8.
        weights: whose weights.
        overrides: settings on top of the model's, of `export` and of what is found, see `change_settings`.

    Returns:
        What `parity.json` says.

    Raises:
        UserError: the folder is torn, the graph and PyTorch disagree, or the export loses more AP than
            `export.max_ap_loss`; nothing is written then.
    """
    set_threads()
    with storage.local_input(model) as path, storage.output_folder(out) as folder:
        source = ModelFolder(path, model, overrides)
        validation = source.validation()
        settings = source.settings.export
        size = settings.image_size or canvas_size(source, validation)
        served = ServedDetector(source.detector(weights), size).eval()
        say(f"export: {weights} of {model}, {size[1]} x {size[0]} pixels, opset {OPSET}")
        file = folder / "model.onnx"
        write_onnx(served, source, size, file)
        detector = OnnxDetector(file)
        samples = np.stack([detector.letterbox(read_image(validation, i)[0])[0] for i in _spread(validation)])
        parity: dict[str, Any] = {"weights": weights, "image_size": size, "opset": OPSET, "onnx_sha256": sha256(file)}
        parity["overrides"] = source.overrides
        for batch in (1, 4):
            found = parity[f"batch_{batch}"] = compare(served, detector, samples, batch)
            if found["matched"] < MIN_MATCHED * found["boxes"]:
                raise UserError(
                    f"{model}: at batch {batch} the ONNX file finds {found['matched']} of PyTorch's {found['boxes']} "
                    "boxes; not exported. Other versions of torch and onnxruntime may help"
                )
        answers = detect_canvases(detector.run, detector, validation, "onnxruntime")
        reference_profile(validation, answers).write(str(folder / "profile.json"))
        parity["ap"] = {
            "onnxruntime": coco_metrics(validation, coco_results(validation, answers))["AP"],
            "pytorch": score_canvases(served.run, detector, validation, "pytorch")["AP"],
        }
        own = source.metrics().get(weights, {}).get("AP", -1.0)
        if not overrides and own - parity["ap"]["pytorch"] > settings.max_ap_loss:
            say(
                f"warning: on canvases of {size[1]} x {size[0]} the detector has AP {parity['ap']['pytorch']:.4f}, on "
                f"images of their own size {own:.4f}; a larger export.image_size loses less"
            )
        parity["validation_fingerprint"] = validation.fingerprint()
        loss = parity["ap"]["pytorch"] - parity["ap"]["onnxruntime"]
        if loss > settings.max_ap_loss:
            raise UserError(
                f"{model}: the ONNX file loses {loss:.4f} AP, {settings.max_ap_loss} allowed "
                "(--set export.max_ap_loss=...); not exported"
            )
        parity["engines"] = measure_engines(folder, served.run, detector, validation, samples, settings, parity["ap"])
        smoke = samples[np.arange(SMOKE_IMAGES) % len(samples)]
        np.savez_compressed(folder / "smoke.npz", allow_pickle=False, images=smoke, **detector.run(smoke))
        parity["smoke_sha256"] = sha256(folder / "smoke.npz")
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


def compare(served: ServedDetector, detector: OnnxDetector, samples: np.ndarray, batch: int) -> dict[str, Any]:
    """ONNX Runtime against PyTorch on the same canvases.

    Args:
        served: the PyTorch side.
        detector: the ONNX side.
        samples: uint8 [N, H, W, 3].
        batch: images per call.

    Returns:
        `boxes` above score .05 on the PyTorch side, how many of them are `matched` (same class, IoU from .5), the
        largest `score_difference`, `box_difference` (pixels) and, with masks, `mask_difference` among the matched.
    """
    boxes, matched, score_difference, box_difference, mask_difference = 0, 0, 0.0, 0.0, 0.0
    for start in range(0, len(samples), batch):
        chunk = samples[start : start + batch]
        ours, theirs = served.run(chunk), detector.run(chunk)
        for n in range(len(chunk)):
            a, b = (to_detections(x, n, (1, 1), (served.size[1], served.size[0])) for x in (ours, theirs))
            a = a[a.scores > SCORE]
            boxes += len(a)
            for i, j in match_boxes(a, b, iou=0.5):
                matched += 1
                score_difference = max(score_difference, abs(float(a.scores[i] - b.scores[j])))
                box_difference = max(box_difference, float(np.abs(a.boxes[i] - b.boxes[j]).max()))
                if a.masks is not None:
                    mask_difference = max(mask_difference, float(np.abs(a.masks[i] - b.masks[j]).max()))
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
