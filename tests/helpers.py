"""What several tests share: a small honest detector as an ONNX file, and its onnx folder."""

import hashlib
import json
import os
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from softteacher import storage
from softteacher.serving.connection import connect, infer
from softteacher.serving.repository import LAST_VERSION

# real data sets and reference numbers, where a developer has them beside the checkout
SHARED = Path(os.environ.get("SOFTTEACHER_SHARED", Path(__file__).parents[2] / "shared"))

SIZE = (64, 96)  # height, width of the detector's input
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
CATEGORIES = [{"id": 3, "name": "dark"}, {"id": 7, "name": 'a "white" \\ square, ü 方'}]


def square_image(
    box: tuple[int, int, int, int], width: int = SIZE[1], height: int = SIZE[0], brightness: int = 255
) -> np.ndarray:
    """A dark image, uint8 [height, width, 3], with a white box (x1, y1, x2, y2)."""
    image = np.full((height, width, 3), 40, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = brightness
    return image


def square_detector(
    path: Path,
    *,
    size: tuple[int, int] = SIZE,
    categories: list[dict] = CATEGORIES,
    score: float = 0.9,
    label: int = 1,
    margin: float = 0,
    grey: tuple[int, float] | None = None,
    slow: int = 0,
    masks: float | None = None,
    foreign_op: bool = False,
) -> Path:
    """An ONNX detector with the project's inputs and outputs that finds the bounding box of all white pixels.

    Args:
        path: file to write.
        size: height and width of the input.
        categories: what its labels mean.
        score: of what it finds.
        label: of what it finds.
        margin: pixels by which its boxes are too large on each side.
        grey: label and margin of squares that are not quite white; by default as of others.
        slow: products of matrices that it computes for nothing.
        masks: answer masks that fill this share of the box from the left, as a fifth output.
        foreign_op: add an operator that no runtime knows (the onnx checker passes it).
    """
    (height, width), k = size, 5
    constants = {
        "channels": np.array([3]),
        "rows": np.array([1]),
        "columns": np.array([2]),
        "threshold": np.float32(160),
        "far": np.float32(1e4),
        "none": np.float32(0),
        "x_low": np.arange(width, dtype=np.float32)[None],
        "x_high": np.arange(1, width + 1, dtype=np.float32)[None],
        "y_low": np.arange(height, dtype=np.float32)[None],
        "y_high": np.arange(1, height + 1, dtype=np.float32)[None],
        "pad_rows": np.array([0, 0, 0, k - 1]),
        "pad_boxes": np.array([0, 0, 0, 0, k - 1, 0]),
        "margin": np.float32([[-margin, -margin, margin, margin]]),
        "score": np.float32(score),
        "label": np.float32(label),
        "white": np.float32(230),
        "grey_label": np.float32(grey[0] if grey else label),
        "grey_margin": np.float32([[-1, -1, 1, 1]]) * np.float32(grey[1] if grey else margin),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("ReduceMin", ["pixels", "channels"], ["brightness"], keepdims=0),  # [B, H, W]
        node("ReduceMax", ["brightness", "rows"], ["of_x"], keepdims=0),  # [B, W]
        node("ReduceMax", ["brightness", "columns"], ["of_y"], keepdims=0),  # [B, H]
        node("Greater", ["of_x", "threshold"], ["x_white"]),
        node("Greater", ["of_y", "threshold"], ["y_white"]),
    ]
    for axis in "xy":
        nodes += [
            node("Where", [f"{axis}_white", f"{axis}_low", "far"], [f"{axis}_lows"]),
            node("Where", [f"{axis}_white", f"{axis}_high", "none"], [f"{axis}_highs"]),
            node("ReduceMin", [f"{axis}_lows", "rows"], [f"{axis}1"]),  # [B, 1]
            node("ReduceMax", [f"{axis}_highs", "rows"], [f"{axis}2"]),
        ]
    if slow:
        constants |= {"zero": np.float32(0), "identity": np.eye(width, dtype=np.float32), "all": np.array([0, 1, 2])}
        steps = ["brightness", *(f"lazy_{n}" for n in range(slow))]
        nodes += [node("MatMul", [a, "identity"], [b]) for a, b in pairwise(steps)]
        nodes += [
            node("ReduceMax", [steps[-1], "all"], ["brightest_of_all"], keepdims=0),
            node("Mul", ["brightest_of_all", "zero"], ["nothing"]),
            node("Add", ["score", "nothing"], ["slow_score"]),
        ]
    nodes += [
        node("Cast", ["x_white"], ["x_found"], to=TensorProto.FLOAT),
        node("ReduceMax", ["x_found", "rows"], ["found"]),  # [B, 1]: 1 or 0
        node("Cast", ["found"], ["num_detections"], to=TensorProto.INT32),
        node("ReduceMax", ["of_x", "rows"], ["brightest"]),  # [B, 1]
        node("Greater", ["brightest", "white"], ["is_white"]),
        node("Where", ["is_white", "label", "grey_label"], ["its_label"]),
        node("Where", ["is_white", "margin", "grey_margin"], ["its_margin"]),
        node("Concat", ["x1", "y1", "x2", "y2"], ["corners"], axis=1),
        node("Add", ["corners", "its_margin"], ["wider"]),
        node("Mul", ["wider", "found"], ["box"]),
        node("Unsqueeze", ["box", "rows"], ["boxes"]),
        node("Pad", ["boxes", "pad_boxes"], ["detection_boxes"]),
        node("Mul", ["found", "slow_score" if slow else "score"], ["scores"]),
        node("Pad", ["scores", "pad_rows"], ["detection_scores"]),
        node("Mul", ["found", "its_label"], ["labels"]),
        node("Pad", ["labels", "pad_rows"], ["padded_labels"]),
        node("Cast", ["padded_labels"], ["detection_classes"], to=TensorProto.INT32),
    ]
    outputs = [
        helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["B", 1]),
        helper.make_tensor_value_info("detection_boxes", TensorProto.FLOAT, ["B", k, 4]),
        helper.make_tensor_value_info("detection_scores", TensorProto.FLOAT, ["B", k]),
        helper.make_tensor_value_info("detection_classes", TensorProto.INT32, ["B", k]),
    ]
    if masks is not None:
        filled = np.broadcast_to(np.arange(28) < 28 * masks, (1, k, 28, 28)).astype(np.float32)
        constants |= {"filled": filled, "deep": np.array([2, 3])}
        nodes += [node("Unsqueeze", ["found", "deep"], ["each"]), node("Mul", ["each", "filled"], ["detection_masks"])]
        outputs.append(helper.make_tensor_value_info("detection_masks", TensorProto.FLOAT, ["B", k, 28, 28]))
    if foreign_op:
        nodes.append(node("Conjure", ["found"], ["rabbit"], domain="nowhere"))
    graph = helper.make_graph(
        nodes,
        "square_detector",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", height, width, 3])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    preprocessing = {"image_size": size, "short_side": height, "long_side": width, "pad": [124, 116, 104]}
    helper.set_model_props(
        model,
        {
            "classes": json.dumps(categories),
            "preprocessing": json.dumps(preprocessing),
            "max_detections": str(k),
        },
    )
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def run_onnx(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """The four outputs of an ONNX detector for uint8 images [B, H, W, 3]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(OUTPUTS, {"images": images}), strict=True))


def onnx_folder(path: Path, *, ap: float = 0.5, validation: Path | None = None, **detector: Any) -> Path:
    """An onnx folder as `export` writes it, around a `square_detector`.

    Args:
        path: the folder.
        ap: what parity.json says.
        validation: a validation manifest; none: just a fingerprint.
        detector: for `square_detector`.
    """
    file = square_detector(path / "model.onnx", **detector)
    height, width = detector.get("size", SIZE)
    images = np.stack([square_image((5 + i, 10, 30 + 9 * i, 40 + i), width, height) for i in range(4)])
    np.savez_compressed(path / "smoke.npz", images=images, **run_onnx(file, images))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    parity = {"ap": {"onnxruntime": ap, "pytorch": ap}, "batch_1": {}, "batch_4": {}, "onnx_sha256": sha256}
    (path / "parity.json").write_text(json.dumps(parity))
    (path / "provenance.json").write_text(json.dumps({"seed": 7}))
    manifest = validation.read_text() if validation else json.dumps({"softteacher": {"fingerprint": "set-1"}})
    (path / "validation.json").write_text(manifest)
    return path


def model_files(repository: str, name: str) -> list[storage.FileInfo]:
    """The files of a model in Triton's repository, but for the number that also a failed deployment draws."""
    return [file for file in storage.list_files(f"{repository}/{name}") if file.name != LAST_VERSION]


def answer(url: str, name: str) -> tuple[str, float]:
    """Version and score of what a `square_detector` answers on Triton about a square."""
    with closing(connect(url, 10)) as server:
        outputs, version = infer(server, url, name, np.stack([square_image((10, 20, 50, 44))]))
    return version, round(float(outputs["detection_scores"][0, 0]), 3)


def ready(url: str, model: str) -> bool:
    """Whether Triton serves a model."""
    with closing(connect(url, 10)) as server:
        return bool(server.is_model_ready(model))
