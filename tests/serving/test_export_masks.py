"""A detector with masks is exported with a fifth output, which answers as PyTorch does."""

import json

import numpy as np
import onnxruntime
import pytest

from softteacher.config import load_settings
from softteacher.data.check import read_image
from softteacher.detections import paste_masks
from softteacher.model_folder import ModelFolder
from softteacher.serving import engines
from softteacher.serving.export import export
from softteacher.serving.graph import ServedDetector
from softteacher.serving.onnx_runtime import OnnxDetector
from softteacher.serving.outputs import MASKS, OUTPUTS, to_detections
from softteacher.serving.repository import config, read_onnx_folder
from softteacher.training.train import train
from tests.samples import MASK_TINY, polygon_tree, write_coco


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder after two steps, and its onnx folder."""
    folder = tmp_path_factory.mktemp("masks")
    data = write_coco(folder / "set", polygon_tree(4), polygon_tree(4, first=101)) / "annotations"
    chosen = [*MASK_TINY, "training.iterations=2", "detector.score_threshold=0.02", "detector.max_detections=20"]
    sources = str(data / "instances_train.json"), None, str(data / "instances_val.json")
    train(*sources, str(folder / "model"), load_settings("demo", [*chosen, "method.name=supervised"]))
    export(str(folder / "model"), str(folder / "onnx"))
    return folder / "model", folder / "onnx"


def test_graph_and_repository(folders):
    session = onnxruntime.InferenceSession(folders[1] / "model.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == [*OUTPUTS, MASKS]
    assert session.get_outputs()[4].shape[1:] == [20, 28, 28]
    model = read_onnx_folder(folders[1])
    assert model.masks
    assert '{ name: "detection_masks" data_type: TYPE_FP32 dims: [ 20, 28, 28 ] }\n]' in config(model, 1)
    parity = json.loads((folders[1] / "parity.json").read_text())
    assert parity["batch_4"]["boxes"] > 0
    assert parity["batch_4"]["mask_difference"] < 1e-3
    assert set(np.load(folders[1] / "smoke.npz").files) == {"images", *OUTPUTS, MASKS}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_pytorch(folders, batch, engine):
    source, detector = ModelFolder(folders[0]), OnnxDetector(folders[1] / "model.onnx")
    pytorch = source.detector("teacher")
    served = ServedDetector(pytorch, detector.image_size).eval()
    images = [read_image(source.validation(), n)[0] for n in range(batch)]
    canvases, scales = zip(*(detector.letterbox(image) for image in images), strict=True)
    ours, theirs = (run(np.stack(canvases)) for run in (served.run, engines.load(folders[1] / "model.onnx", engine)))
    assert (ours["num_detections"] > 0).any()
    for n, (image, scale) in enumerate(zip(images, scales, strict=True)):
        a, b = (to_detections(answer, n, scale, image.size) for answer in (ours, theirs))
        assert a.masks.shape == (len(a), 28, 28)
        np.testing.assert_allclose(b.masks, a.masks, atol=1e-3)
        assert paste_masks(b, image.height, image.width).shape == (len(b), image.height, image.width)
